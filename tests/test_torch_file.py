"""PyTorch checkpoints: what is read and written, and when it is read.

All comparisons are exact.
"""

import argparse
import collections
import os
import pathlib
import pickle
import struct
import weakref
import zipfile

import numpy as np
import pytest
import torch

from crossmae_jax.convert.files import tensor, torch_file
from tests.torch_files import (
    DTYPES,
    FORMS,
    GOLDEN,
    assert_same,
    bits,
    built,
    make,
    plain,
    save,
    stored,
)


def test_weights_moments_and_arguments_are_read_without_pytorch():
    checkpoint = torch_file.read(GOLDEN / "ckpt_mae.pth")
    assert checkpoint["args"]["mask_ratio"] == 0.75
    assert checkpoint["epoch"] == 3
    assert checkpoint["model"]["pos_embed"].shape == (1, 17, 16)
    assert len(checkpoint["optimizer"]["state"]) == 48


@pytest.mark.parametrize("name", [
    "ckpt_crossmae.pth", "ckpt_mae.pth", "ckpt_encoder_only.pth",
    "ckpt_encoder_only_legacy.pth",
])
def test_real_checkpoints_are_read_as_pytorch_reads_them(name):
    def compare(ours, theirs):
        if isinstance(theirs, torch.Tensor):
            assert_same(ours, theirs)
        elif isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            for key in theirs:
                compare(ours[key], theirs[key])
        elif isinstance(theirs, list | tuple):
            assert type(ours) is type(theirs) and len(ours) == len(theirs)
            for pair in zip(ours, theirs):
                compare(*pair)
        else:
            assert ours == theirs
    theirs = torch.load(GOLDEN / name, weights_only=False)
    if "args" in theirs:
        theirs["args"] = vars(theirs["args"])
    compare(torch_file.read(GOLDEN / name), theirs)


def test_both_forms_of_the_same_weights_read_equal():
    new = torch_file.read(GOLDEN / "ckpt_encoder_only.pth")["model"]
    old = torch_file.read(GOLDEN / "ckpt_encoder_only_legacy.pth")["model"]
    assert list(new) == list(old)
    for name in new:
        np.testing.assert_array_equal(new[name].read(), old[name].read())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read(tmp_path, form, dtype):
    values = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    path = save({"x": values, "scalar": values[1, 2]}, tmp_path / "x.pth", form)
    ours = torch_file.read(path)
    assert ours["x"].dtype == DTYPES[dtype]
    assert_same(ours["x"], values)
    assert_same(ours["scalar"], values[1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_views_and_shared_storages_are_read(tmp_path, form):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "base": base, "transposed": base.permute(2, 0, 1), "column": base[:, 1:2, 3],
        "part": base[1], "every_second": base[..., ::2], "last": base[2, 3, 4],
        "parameter": torch.nn.Parameter(base[0].T), "none": base[:0].permute(1, 2, 0),
        "empty": torch.zeros(0, 7), "one": base[:1, :1, :1].permute(2, 0, 1),
        "expanded_by_one": base[0, 0].expand(1, 5),
        "step_too_long": torch.as_strided(base, (1, 5), (2**62, 1), 7),
        "steps_too_long": torch.as_strided(base, (3, 1, 2), (1, 2**62, 20), 7),
        "channels_last": base[None].to(memory_format=torch.channels_last),
    }
    ours = torch_file.read(save(views, tmp_path / "views.pth", form))
    for name, theirs in views.items():
        assert_same(ours[name], theirs)
        assert ours[name].read().flags.c_contiguous


@pytest.mark.parametrize("form", FORMS)
def test_the_arguments_of_a_run_become_plain_values(tmp_path, form):
    module = torch.nn.Linear(2, 3)
    arguments = argparse.Namespace(
        device=torch.device("cuda", 1), host=torch.device("cpu"), dtype=torch.bfloat16,
        output=pathlib.PosixPath("/a/b/c"), here=pathlib.PosixPath("."),
        size=torch.Size([2, 3]), rate=np.float64(0.1), count=np.int32(-7),
        half=np.float16(0.5), flag=np.bool_(True), many=[1, 2.5, None, (True, "ü")],
        inner=argparse.Namespace(a=1), seen={1, 2}, big=2**70,
    )
    content = {"args": arguments, "model": module.state_dict(), 3: "three"}
    ours = torch_file.read(save(content, tmp_path / "args.pth", form))
    assert ours["args"] == {
        "device": "cuda:1", "host": "cpu", "dtype": "torch.bfloat16",
        "output": "/a/b/c", "here": ".", "size": (2, 3), "rate": 0.1, "count": -7,
        "half": 0.5, "flag": True, "many": [1, 2.5, None, (True, "ü")],
        "inner": {"a": 1}, "seen": {1, 2}, "big": 2**70,
    }
    assert isinstance(ours["args"], dict)
    assert [type(ours["args"][name]) for name in ("rate", "count", "flag")] == [
        float, int, bool
    ]
    assert list(ours) == ["args", "model", 3] and list(ours["model"]) == [
        "weight", "bias"
    ]
    assert_same(ours["model"]["weight"], module.weight)


def test_a_view_of_another_storage_is_read(tmp_path):
    body = b"(" + built(stored(view=("v", 1, 3)), 1, (2,), (1,)) + b"t"
    values, = torch_file.read(make(tmp_path / "view.pth", "legacy", body))
    np.testing.assert_array_equal(values.read(), [2, 3])
    outside = built(stored(view=("v", 2, 3)), 0, (2,), (1,))
    with pytest.raises(ValueError, match="view of storage 0 reaches outside"):
        torch_file.read(make(tmp_path / "view.pth", "legacy", outside))
    beyond = built(stored(view=("v", 1, 3)), 2, (2,), (1,))
    with pytest.raises(ValueError, match="reaches outside its storage of 3 values"):
        torch_file.read(make(tmp_path / "view.pth", "legacy", beyond))


# Laziness.


@pytest.mark.parametrize("name", ["ckpt_mae.pth", "ckpt_encoder_only_legacy.pth"])
def test_a_description_reads_no_storage(monkeypatch, name):
    calls = []
    fromfile = np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda *args, **kw: calls.append(args) or fromfile(*args, **kw)
    )
    model = torch_file.read(GOLDEN / name)["model"]
    assert not calls
    model["pos_embed"].read()
    assert len(calls) == 1


def test_a_file_larger_than_memory_is_described(tmp_path):
    count = 2**34  # 64 GiB, of which the file system keeps nothing
    body = (
        b"}(" + plain("large") + built(stored("a", count), 0, (count,), (1,))
        + plain("small") + built(stored("b", 2), 0, (2,), (1,)) + b"u"
    )
    path = make(tmp_path / "large.pth", "legacy", body, storages={})
    head = path.read_bytes().removesuffix(pickle.dumps([], protocol=2))
    head += pickle.dumps(["a", "b"], protocol=2)
    with path.open("wb") as file:
        file.write(head + struct.pack("<q", count))
        file.seek(4 * count, os.SEEK_CUR)
        file.write(struct.pack("<qff", 2, 3, 4))
    ours = torch_file.read(path)
    assert ours["large"].shape == (count,)
    np.testing.assert_array_equal(ours["small"].read(), [3, 4])


# Writing.


def _written(path, tensors):
    torch_file.write(path, {
        "model": {name: tensor.of_array(value) for name, value in tensors.items()},
        "card": '{"name": "ü"}', "empty": {},
    })
    return path


def _values():
    dice = np.random.default_rng(0)
    shapes = [(3, 4), (), (0, 5), (2, 1, 7), (65,)]
    return {
        f"{name}.{number}": np.asarray(10 * dice.normal(size=shape)).astype(dtype)
        for name, dtype in DTYPES.items() for number, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("how", [
    {"weights_only": True}, {"weights_only": True, "mmap": True},
    {"weights_only": False}, {},
])
def test_pytorch_reads_what_is_written(tmp_path, how):
    values = _values()
    theirs = torch.load(_written(tmp_path / "x.pth", values), **how)
    assert list(theirs) == ["model", "card", "empty"]
    assert theirs["card"] == '{"name": "ü"}'
    assert type(theirs["model"]) is collections.OrderedDict
    assert list(theirs["model"]) == list(values)
    for name, expected in values.items():
        found = theirs["model"][name]
        assert str(found.dtype) == f"torch.{expected.dtype.name}"
        assert found.is_contiguous() and found.shape == expected.shape
        np.testing.assert_array_equal(bits(found), expected)


def test_what_is_written_is_read_here(tmp_path):
    values = _values()
    ours = torch_file.read(_written(tmp_path / "x.pth", values))
    assert ours["card"] == '{"name": "ü"}' and ours["empty"] == {}
    assert list(ours["model"]) == list(values)
    for name, expected in values.items():
        assert ours["model"][name].dtype == expected.dtype
        found = ours["model"][name].read()
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_values_that_do_not_lie_in_a_row_are_written_as_if(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    views = {"t": values.T, "s": values[::2, 1:3], "column": values[:, 1]}
    theirs = torch.load(_written(tmp_path / "x.pth", views))["model"]
    for name, expected in views.items():
        np.testing.assert_array_equal(theirs[name].numpy(), expected)


def test_a_state_dict_of_pytorch_comes_back_strictly(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    source = save(model.state_dict(), tmp_path / "a.pth", "zip")
    torch_file.write(tmp_path / "b.pth", {"model": torch_file.read(source)})
    torch.nn.init.zeros_(model[0].weight)
    model.load_state_dict(torch.load(tmp_path / "b.pth")["model"], strict=True)
    for name, theirs in torch.load(source).items():
        assert torch.equal(model.state_dict()[name], theirs)


def test_storages_are_aligned_for_mmap_and_checksums_hold(tmp_path):
    path = _written(tmp_path / "x.pth", _values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    for found in torch.load(path, mmap=True)["model"].values():
        assert found.numel() == 0 or found.data_ptr() % 64 == 0


def test_entries_of_any_size_are_written(tmp_path, monkeypatch):
    # As if the limit of old archives were 100 bytes instead of 2 GiB.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    values = {"long": np.arange(64.0), "short": np.arange(3.0), "next": np.ones(40)}
    path = _written(tmp_path / "x.pth", values)
    assert b"\x01\x00\x10\x00" in path.read_bytes(), "no field of a large entry"
    monkeypatch.undo()
    theirs = torch.load(path, mmap=True)["model"]
    ours = torch_file.read(path)["model"]
    for name, expected in values.items():
        np.testing.assert_array_equal(theirs[name].numpy(), expected)
        assert theirs[name].data_ptr() % 64 == 0
        np.testing.assert_array_equal(ours[name].read(), expected)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    last = []

    def watched():
        assert not last or last[-1]() is None
        values = np.zeros(5)
        last.append(weakref.ref(values))
        return values

    lazy = tensor.Tensor((5,), np.dtype(np.float64), watched)
    torch_file.write(tmp_path / "x.pth", {"model": {str(n): lazy for n in range(4)}})
    assert len(last) == 4


def test_types_without_a_storage_are_named(tmp_path):
    for dtype in (np.complex64, np.uint16, ">f4"):
        with pytest.raises(ValueError, match="no storage for .*Known: float64, "):
            _written(tmp_path / "x.pth", {"x": np.zeros(2, dtype)})
    assert not (tmp_path / "x.pth").exists()
