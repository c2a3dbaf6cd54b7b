"""PyTorch checkpoints: what is read and written, what is refused, and when it is read.

All comparisons are exact.
"""

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import tarfile
import weakref
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from crossmae_jax.convert import tensor, torch_file

GOLDEN = Path(__file__).parent / "golden"
FORMS = ("zip", "legacy")
DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}


def _save(content, path, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def _bits(value):
    """Values of PyTorch as NumPy's, bfloat16 included."""
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _assert_same(ours, theirs):
    assert isinstance(ours, tensor.Tensor)
    values, expected = ours.read(), _bits(theirs)
    assert ours.shape == values.shape == expected.shape
    assert ours.dtype == values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


# Pickles by hand. `_plain` leaves out the first and last opcode.


def _plain(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _call(module, name, *arguments):
    return _global(module, name) + b"(" + b"".join(arguments) + b"tR"


def _stored(key="0", count=4, kind="FloatStorage", view=None):
    return (
        b"(" + _plain("storage") + _global("torch", kind) + _plain(key) + _plain("cpu")
        + _plain(count) + (b"" if view is None else _plain(view)) + b"tQ"
    )


def _rebuilt(storage, offset, size, stride, *more):
    return _call(
        "torch._utils", "_rebuild_tensor_v2", storage, _plain(offset), _plain(size),
        _plain(stride), _plain(False), _call("collections", "OrderedDict"),
        *map(_plain, more),
    )


def _file(path, form, body, *, storages=None, entry=None):
    """Writes a checkpoint around the body of a pickle."""
    storages = {"0": np.arange(4, dtype=np.float32)} if storages is None else storages
    body = b"\x80\x02" + body + b"."
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", body)
            for key, values in storages.items():
                archive.writestr(f"archive/data/{key}", values.tobytes())
        return path
    system = {"little_endian": True, "protocol_version": 1001}
    parts = [pickle.dumps(part, protocol=2) for part in
             (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [body, pickle.dumps(sorted(storages), protocol=2)]
    for key in sorted(storages):
        parts.append(struct.pack("<q", storages[key].size) + storages[key].tobytes())
    path.write_bytes(b"".join(parts))
    return path


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
            _assert_same(ours, theirs)
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
    path = _save({"x": values, "scalar": values[1, 2]}, tmp_path / "x.pth", form)
    ours = torch_file.read(path)
    assert ours["x"].dtype == DTYPES[dtype]
    _assert_same(ours["x"], values)
    _assert_same(ours["scalar"], values[1, 2])


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
    ours = torch_file.read(_save(views, tmp_path / "views.pth", form))
    for name, theirs in views.items():
        _assert_same(ours[name], theirs)
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
    ours = torch_file.read(_save(content, tmp_path / "args.pth", form))
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
    _assert_same(ours["model"]["weight"], module.weight)


def test_a_view_of_another_storage_is_read(tmp_path):
    body = b"(" + _rebuilt(_stored(view=("v", 1, 3)), 1, (2,), (1,)) + b"t"
    values, = torch_file.read(_file(tmp_path / "view.pth", "legacy", body))
    np.testing.assert_array_equal(values.read(), [2, 3])
    outside = _rebuilt(_stored(view=("v", 2, 3)), 0, (2,), (1,))
    with pytest.raises(ValueError, match="view of storage 0 reaches outside"):
        torch_file.read(_file(tmp_path / "view.pth", "legacy", outside))
    beyond = _rebuilt(_stored(view=("v", 1, 3)), 2, (2,), (1,))
    with pytest.raises(ValueError, match="reaches outside its storage of 3 values"):
        torch_file.read(_file(tmp_path / "view.pth", "legacy", beyond))


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
        b"}(" + _plain("large") + _rebuilt(_stored("a", count), 0, (count,), (1,))
        + _plain("small") + _rebuilt(_stored("b", 2), 0, (2,), (1,)) + b"u"
    )
    path = _file(tmp_path / "large.pth", "legacy", body, storages={})
    head = path.read_bytes().removesuffix(pickle.dumps([], protocol=2))
    head += pickle.dumps(["a", "b"], protocol=2)
    with path.open("wb") as file:
        file.write(head + struct.pack("<q", count))
        file.seek(4 * count, os.SEEK_CUR)
        file.write(struct.pack("<qff", 2, 3, 4))
    ours = torch_file.read(path)
    assert ours["large"].shape == (count,)
    np.testing.assert_array_equal(ours["small"].read(), [3, 4])


# Files that would do harm.


class _Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, form):
    target = tmp_path / "made_by_the_checkpoint"
    payload = pickle.dumps({"model": _Malice(target)}, protocol=2)
    pickle.loads(payload)
    assert target.exists(), "the payload does harm where it is trusted"
    target.rmdir()
    path = _file(tmp_path / "evil.pth", form, payload[2:-1])
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, .* was executed"):
        torch_file.read(path)
    assert not target.exists()


def test_code_in_any_pickle_of_a_legacy_file_is_not_run(tmp_path):
    target = tmp_path / "made_by_the_checkpoint"
    whole = _file(tmp_path / "good.pth", "legacy", b"}").read_bytes()
    evil = pickle.dumps(_Malice(target), protocol=2)
    stream = io.BytesIO(whole)
    begins = []
    for _ in range(5):
        begins.append(stream.tell())
        pickle.load(stream)
    begins.append(stream.tell())
    path = tmp_path / "evil.pth"
    for begin, end in zip(begins[1:], begins[2:]):
        path.write_bytes(whole[:begin] + evil + whole[end:])
        with pytest.raises(ValueError, match=r"it names posix\.mkdir"):
            torch_file.read(path)
    assert not target.exists()


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("__builtin__", "eval"), ("builtins", "getattr"),
    ("torch.load", ""), ("torch._utils", "_rebuild_tensor_v3"), ("numpy", "ndarray"),
    ("torch.serialization", "load"), ("collections", "defaultdict"), ("torch", "load"),
])
def test_names_that_weights_do_not_need_are_refused(tmp_path, module, name):
    path = _file(tmp_path / "x.pth", "zip", _global(module, name))
    with pytest.raises(ValueError, match="was refused: it names ") as error:
        torch_file.read(path)
    assert f"{module}.{name}," in str(error.value)


_TENSOR = _rebuilt(_stored(), 0, (4,), (1,))
_DTYPE = _call("numpy", "dtype", _plain("f8"), _plain(False), _plain(True))


# Python's hash of a tuple of this depth overflows the stack and ends the process.
_NESTED = b")" + b"\x85" * 200_000


_HOSTILE = [
    # Instructions on objects that no checkpoint gives them for.
    (_TENSOR + b"}" + _plain("shape") + _plain((2**60,)) + b"sb", "sets attributes"),
    (_global("torch", "Size") + b"}b", "sets attributes of type str"),
    (_plain(5) + b")R", "it calls .* of type int"),
    (_plain("posix.system") + b"(" + _plain("ls") + b"tR", "it calls .* of type str"),
    (_NESTED + b")R", "it calls .* of type tuple"),
    (_TENSOR + _plain(1) + b"a", "is damaged"),
    (b"]K\x05aK\x00K\x01s", "sets an item of a list"),
    (b"I1\n", "the instruction INT"),
    (b"\x93", "the instruction STACK_GLOBAL"),
    (b"\x82\x01", "the instruction EXT1"),
    (b"P0\n", "the instruction PERSID"),
    (b"}" + _NESTED + b"Ns", "key of type tuple"),
    (b"}(" + _NESTED + b"Nu", "key of type tuple"),
    (_call("argparse", "Namespace") + b"]" + _NESTED + b"N\x86ab", "is damaged"),
    (_call("__builtin__", "set", b"]" + _NESTED + b"a"), "key of type tuple"),
    (_call("collections", "OrderedDict", b"]" + _NESTED + b"N\x86a"), "type tuple"),
    (_call("argparse", "Namespace") + b"}" + _NESTED + b"Nsb", "key of type tuple"),
    # Names of storages and calls are looked up in tables.
    (b"(" + _plain("storage") + _NESTED + _plain("0") + b"NK\x04tQ", "is no storage"),
    (b"(" + _plain("storage") + _global("torch", "FloatStorage") + _NESTED
     + b"NK\x04tQ", "is no storage"),
    (_stored("no such"), "is damaged"),
    (b"(" + _plain("module") + _plain("a") + _plain("b") + _plain("c") + b"NtQ",
     "is no storage"),
    (b"(" + _plain("storage") + _plain("torch.Storage") + _plain("0") + b"NK\x01tQ",
     "KeyError: 'torch.Storage'"),
    (_plain(3) + b"Q", "is damaged"),
    # NumPy's types can hold objects, which are addresses in memory.
    (_call("numpy", "dtype", _plain("O8"), _plain(False), _plain(True)), "type O8"),
    (_call("numpy", "dtype", _plain("V9"), _plain(False), _plain(True)), "type V9"),
    (_call("numpy.core.multiarray", "scalar", _DTYPE,
           _call("_codecs", "encode", _plain("abc"), _plain("latin1"))), "wrong size"),
    (_call("numpy.core.multiarray", "scalar", _TENSOR, _plain("8 bytes.")), "wrong"),
    (_DTYPE + _plain((3, ">", None, None, None, -1, -1, 0)) + b"b", "big-endian"),
    # Text that grows with every level: 2**50 characters.
    (_call("torch", "device", _plain("a") + b"".join(
        b"q\x00(h\x00h\x00t" for _ in range(50))), "is damaged"),
    (_call("torch", "device", _plain("cuda"), b"]" + b"".join(
        b"q\x00(h\x00h\x00t" for _ in range(50))), "is damaged"),
    (_call("_codecs", "encode", _plain(3), _plain("latin1")), "is damaged"),
    (_call("pathlib", "PosixPath", _plain(3)), "is damaged"),
    # Storages and tensors that are not what the file holds.
    (_stored(count=5), "too short for 5 values"),
    (_stored(count=-1), "a size that is no count"),
    (_stored(count=2**70), "a size that is no count"),
    (_stored(count="4"), "a size that is no count"),
    (_rebuilt(_stored(), 2, (2, 2), (2, 1)), "outside its storage of 4 values"),
    (_rebuilt(_stored(), 4, (1,), (1,)), "outside its storage of 4 values"),
    (_rebuilt(_stored(), 4, (), ()), "outside its storage of 4 values"),
    (_rebuilt(_stored(), 0, (5,), (1,)), "outside its storage of 4 values"),
    (_rebuilt(_stored(), 0, (2**40,), (0,)), "or repeats them"),
    (_rebuilt(_stored(), 0, (3, 2), (1, 1)), "or repeats them"),
    (_rebuilt(_stored(), -1, (1,), (1,)), "no count"),
    (_rebuilt(_stored(), 0, (-1,), (1,)), "no count"),
    (_rebuilt(_stored(), 3, (2,), (-1,)), "no count"),
    (_rebuilt(_stored(), 0, (2.0,), (1,)), "no count"),
    (_rebuilt(_stored(), True, (2,), (1,)), "no count"),
    (_rebuilt(_stored(), 0, (2**63,), (1,)), "no count"),
    (_rebuilt(_stored(), 0, (0, 2**62, 2**62), (1, 1, 1)), "is damaged"),
    (_rebuilt(_stored(), 0, (1,) * 65, (1,) * 65), "is damaged"),
    (_rebuilt(_stored(), 0, (2, 2), (1,)), "is damaged"),
    (_rebuilt(_plain("0"), 0, (1,), (1,)), "is damaged"),
    (_rebuilt(_stored(), 0, (4,), (1,), {"conj": True}), "conjugate or negative view"),
    # Pickles that end too soon, or take more than there is.
    (b"R", "is damaged"),
    (b"K\x01\x86R", "is damaged"),
    (b"t", "is damaged"),
    (b"h\x09", "is damaged"),
    (b"](K\x01u", "is damaged"),
    (b"}(K\x01u", "is damaged"),
    (b"X\xff\xff\xff\x7f", "is damaged"),
    (b"\x8a\xff", "is damaged"),
    (b"\xfe", "is damaged"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body, message", _HOSTILE, ids=range(len(_HOSTILE)))
def test_hostile_and_broken_pickles_are_errors_of_value(tmp_path, form, body, message):
    path = _file(tmp_path / "hostile.pth", form, body)
    with pytest.raises(ValueError, match=message) as error:
        torch_file.read(path)
    assert str(error.value).startswith(str(path))


def test_a_memo_with_a_far_index_takes_no_memory(tmp_path):
    # Python's own unpickler would make a list of 2**33 places.
    body = b"}r\xff\xff\xff\xff"
    assert torch_file.read(_file(tmp_path / "memo.pth", "zip", body)) == {}


_LONG = b"](" + b"N" * 3000 + b"eq\x00"
_PAIRS = b"](" + b"K\x01N\x86" * 3000 + b"eq\x00"
_TEXT = _plain("a" * 3000)  # which is q\x00 too
_ITEMS = b"}(" + b"".join(_plain(n) + b"N" for n in range(3000)) + b"uq\x00"


@pytest.mark.parametrize("long, copy", [
    (_LONG, _call("torch", "Size", b"h\x00")),
    (_PAIRS, _call("collections", "OrderedDict", b"h\x00")),
    (_LONG, _call("__builtin__", "set", b"h\x00")),
    (_TEXT, _call("_codecs", "encode", b"h\x00", b"N")),
    (_TEXT, _call("pathlib", "PosixPath", b"h\x00")),
    (_TEXT, _call("torch", "device", b"h\x00")),
    (_ITEMS, _call("argparse", "Namespace") + b"h\x00b"),
], ids=["size", "pairs", "set", "bytes", "path", "device", "namespace"])
def test_a_small_file_does_not_grow_by_copies(tmp_path, long, copy):
    path = _file(tmp_path / "copies.pth", "zip", b"](" + long + copy * 1000 + b"e")
    with pytest.raises(ValueError, match="what it describes is larger than itself"):
        torch_file.read(path)


def test_pickles_of_another_protocol_name_the_cure(tmp_path):
    path = tmp_path / "four.pth"
    torch.save({"x": torch.zeros(2)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="pickle of protocol 4. Load it in PyTorch"):
        torch_file.read(path)


# Files that are damaged, or of another kind.


@pytest.mark.parametrize("name", [
    "ckpt_encoder_only.pth", "ckpt_encoder_only_legacy.pth"
])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    whole = (GOLDEN / name).read_bytes()
    path = tmp_path / "short.pth"
    for end in [*range(0, 3000, 97), *range(3000, len(whole), 2903), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=str(path)):
            torch_file.read(path)


@pytest.mark.parametrize("form", FORMS)
def test_any_changed_byte_is_read_or_an_error_of_value(tmp_path, form):
    arguments = argparse.Namespace(rate=np.float64(0.1), device=torch.device("cpu"))
    content = {"x": torch.arange(6.0).reshape(2, 3).T, "args": arguments}
    whole = _save(content, tmp_path / "whole.pth", form).read_bytes()
    dice = random.Random(0)
    path = tmp_path / "changed.pth"
    refused = 0
    for position in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[position] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            ours = torch_file.read(path)
        except ValueError:
            refused += 1
        else:
            found = ours.values() if isinstance(ours, dict) else ()
            for value in found:
                if isinstance(value, tensor.Tensor):
                    assert value.size <= 6
                    assert value.read().shape == value.shape
    assert refused > 100


def test_keys_of_storages_that_are_no_strings_are_refused(tmp_path):
    path = _file(tmp_path / "keys.pth", "legacy", b"}", storages={})
    head = path.read_bytes().removesuffix(pickle.dumps([], protocol=2))
    path.write_bytes(head + b"\x80\x02]" + _NESTED + b"a.")
    with pytest.raises(ValueError, match="a storage has no name"):
        torch_file.read(path)


def test_a_storage_with_a_wrong_count_is_refused(tmp_path):
    path = _file(tmp_path / "count.pth", "legacy", _TENSOR)
    whole = path.read_bytes()
    for count in (-1, 5, 2**62):
        path.write_bytes(whole[:-24] + struct.pack("<q", count) + whole[-16:])
        with pytest.raises(ValueError, match="storage 0 ends after the file"):
            torch_file.read(path)
    path.write_bytes(whole[:-24] + struct.pack("<q", 3) + whole[-16:])
    with pytest.raises(ValueError, match="storage 0 is too short for 4 values"):
        torch_file.read(path)


def test_an_entry_that_is_not_where_the_archive_says_is_refused(tmp_path):
    path = _file(tmp_path / "moved.pth", "zip", _TENSOR)
    whole = path.read_bytes()
    begin = whole.index(b"PK\x03\x04", 4)
    path.write_bytes(whole[:begin] + b"PK\x03\x05" + whole[begin + 4:])
    with pytest.raises(ValueError, match="data/0 is not where the archive says"):
        torch_file.read(path)
    # The length of the name in the header of the entry: the storage would end after
    # the file.
    path.write_bytes(whole[:begin + 26] + b"\xff\xff" + whole[begin + 28:])
    with pytest.raises(ValueError, match="data/0 is not where the archive says"):
        torch_file.read(path)


@pytest.mark.parametrize("compressed", ["data.pkl", "data/0"])
def test_compressed_entries_name_the_cure(tmp_path, compressed):
    path = tmp_path / "compressed.pth"
    source = _file(tmp_path / "plain.pth", "zip", _TENSOR)
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(path, "w") as archive:
        for info in plain.infolist():
            deflated = info.filename.endswith(compressed)
            archive.writestr(
                info.filename, plain.read(info),
                zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED,
            )
    with pytest.raises(ValueError, match=f"{compressed} compressed .* torch.save"):
        torch_file.read(path)


def test_encrypted_entries_name_the_cure(tmp_path):
    path = _file(tmp_path / "encrypted.pth", "zip", _TENSOR)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="data.pkl compressed or encrypted"):
        torch_file.read(path)


def test_tar_files_name_the_cure(tmp_path):
    path = tmp_path / "tar.pth"
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="is a tar archive .* torch.save"):
        torch_file.read(path)


def test_big_endian_files_are_refused(tmp_path):
    path = _file(tmp_path / "big.pth", "zip", _TENSOR)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="big-endian machine"):
        torch_file.read(path)
    path = _file(tmp_path / "big.pth", "legacy", _TENSOR)
    whole = path.read_bytes()
    assert whole.count(b"little_endianq\x01\x88") == 1
    path.write_bytes(whole.replace(b"endianq\x01\x88", b"endianq\x01\x89"))
    with pytest.raises(ValueError, match="big-endian machine"):
        torch_file.read(path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "other.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    with pytest.raises(ValueError, match="does not begin as a file of torch.save"):
        torch_file.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="other.pth"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="expected one data.pkl inside, found 0"):
        torch_file.read(path)
    with pytest.raises(FileNotFoundError, match="No checkpoint .*gone.pth"):
        torch_file.read(tmp_path / "gone.pth")


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
        np.testing.assert_array_equal(_bits(found), expected)


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
    source = _save(model.state_dict(), tmp_path / "a.pth", "zip")
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
