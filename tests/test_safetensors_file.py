"""Safetensors files against the format's own package, and every demand of the format.

All comparisons are exact.
"""

import json
import random
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from crossmae_jax.convert.files import safetensors_file, tensor

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}


def _values():
    dice = np.random.default_rng(0)
    shapes = [(3, 4), (), (0, 5), (2, 1, 7), (65,)]
    return {
        f"{name}.{number}": np.asarray(10 * dice.normal(size=shape) ** 2).astype(dtype)
        for name, dtype in DTYPES.items() for number, shape in enumerate(shapes)
    }


def _write(path, values, metadata=None):
    lazy = {name: tensor.of_array(value) for name, value in values.items()}
    safetensors_file.write(path, lazy, metadata or {})
    return path


def _assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        found = ours[name].read()
        assert ours[name].shape == found.shape == value.shape
        assert ours[name].dtype == found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


def _file(path, header, values=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + values)
    return path


def _entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_type_of_the_package_is_read(tmp_path):
    values = {k: v for k, v in _values().items() if not k.startswith("BF16")}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(values, path, {"card": '{"ü": 1}', "format": "np"})
    ours, metadata = safetensors_file.read(path)
    _assert_same(ours, values)
    assert metadata == {"card": '{"ü": 1}', "format": "np"}


def test_bfloat16_of_the_package_is_read(tmp_path):
    values = torch.arange(7.0).to(torch.bfloat16)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": values}, path)
    ours, metadata = safetensors_file.read(path)
    _assert_same(ours, {"x": values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)})
    assert metadata == {}


def test_the_package_reads_every_type_that_is_written(tmp_path):
    values = _values()
    metadata = {"card": '{"ü": 1}', "empty": ""}
    path = _write(tmp_path / "x.safetensors", values, metadata)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == metadata
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == values.keys()
    for name, expected in values.items():
        found = theirs[name]
        if found.dtype == torch.bfloat16:
            found = found.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(found), expected, strict=True)


def test_what_is_written_is_read_here(tmp_path):
    values = _values()
    path = _write(tmp_path / "x.safetensors", values)
    ours, metadata = safetensors_file.read(path)
    _assert_same(ours, values)
    assert metadata == {}


def test_no_tensors_are_a_file_too(tmp_path):
    path = _write(tmp_path / "x.safetensors", {})
    assert safetensors_file.read(path) == ({}, {})
    assert safetensors.numpy.load_file(path) == {}


def test_tensors_are_written_aligned_and_in_order(tmp_path):
    values = {
        "odd": np.zeros(3, np.uint8), "b": np.zeros(3, np.float32),
        "half": np.zeros(3, np.float16), "a": np.zeros(2, np.float32),
        "wide": np.zeros(1), "flag": np.zeros(5, np.bool_),
    }
    path = _write(tmp_path / "x.safetensors", values, {"format": "pt"})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    header = json.loads(path.read_bytes()[8:8 + length])
    for name, value in values.items():
        assert header[name]["data_offsets"][0] % value.dtype.itemsize == 0
    ours, _ = safetensors_file.read(path)
    assert list(ours) == ["wide", "b", "a", "half", "odd", "flag"]


def test_tensors_come_in_the_order_of_the_file(tmp_path):
    header = {"a": _entry(8, 12, [1]), "b": _entry(0, 8, [2]), "c": _entry(8, 8, [0])}
    path = _file(tmp_path / "x", header, np.arange(3, dtype=np.float32).tobytes())
    ours, _ = safetensors_file.read(path)
    assert list(ours) == ["b", "c", "a"]
    _assert_same(ours, {
        "b": np.array([0, 1], np.float32), "c": np.zeros(0, np.float32),
        "a": np.array([2], np.float32),
    })


def test_values_that_do_not_lie_in_a_row_are_written_as_if(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    views = {"t": values.T, "s": values[::2, 1:3], "column": values[:, 1]}
    path = _write(tmp_path / "x", views)
    _assert_same(safetensors_file.read(path)[0], views)


def test_a_description_reads_no_values(tmp_path, monkeypatch):
    path = tmp_path / "large"
    size = 2**36  # 64 GiB, of which the file system keeps nothing
    _file(path, {"a": _entry(0, size, [size // 4]), "b": _entry(size, size + 4, [1])})
    with path.open("ab") as file:
        end = file.tell() + size
        file.truncate(end)
        file.write(np.float32(7).tobytes())
    ours, _ = safetensors_file.read(path)
    assert ours["a"].shape == (size // 4,)
    np.testing.assert_array_equal(ours["b"].read(), [7])


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    last = []

    def read():
        assert not last or last[-1]() is None
        values = np.zeros(5)
        last.append(weakref.ref(values))
        return values

    lazy = tensor.Tensor((5,), np.dtype(np.float64), read)
    safetensors_file.write(tmp_path / "x", {str(n): lazy for n in range(4)}, {})
    assert len(last) == 4


_FOUR = bytes(16)
# What NumPy has no arrays for, and the package first finds when values are read.
_ONLY_HERE = [
    {"a": _entry(0, 4, [1] * 65)}, {"a": _entry(0, 0, [0, 2**62, 2**62])},
]


@pytest.mark.parametrize("header, values, message", [
    (b"", _FOUR, "no JSON"),
    (b"{", _FOUR, "no JSON"),
    (b"[]", b"", "no JSON object"),
    (b"{}x", b"", "no JSON"),
    (b"\xff\xfe", b"", "no JSON"),
    (b"{\"a\": " + b"[" * 100_000, b"", "no JSON"),
    (b'{"__metadata__": {}, "__metadata__": {}}', b"", "names something twice"),
    (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
     b"", "names something twice"),
    ({"__metadata__": {"a": 1}}, b"", "values that are no strings"),
    ({"__metadata__": ["a"]}, b"", "values that are no strings"),
    ({"a": 3}, _FOUR, "a needs data_offsets, dtype, shape"),
    ({"a": {"dtype": "F32", "shape": [4]}}, _FOUR, "a needs data_offsets"),
    ({"a": _entry(0, 16, [4], "F33")}, _FOUR, "dtype='F33'; known are F64, F32"),
    ({"a": _entry(0, 16, [4], ["F32"])}, _FOUR, "known are F64, F32"),
    ({"a": _entry(0, 16, 4)}, _FOUR, "shape=4"),
    ({"a": _entry(0, 16, [4.0])}, _FOUR, r"shape=\[4.0\]"),
    ({"a": _entry(0, 16, [-4])}, _FOUR, r"shape=\[-4\]"),
    ({"a": _entry(0, 16, [-2, -2])}, _FOUR, r"shape=\[-2, -2\]"),
    ({"a": _entry(0, 4, [True])}, bytes(4), r"shape=\[True\]"),
    ({"a": _entry(0, 16, [2**63])}, _FOUR, "shape="),
    ({"a": _entry(0, 0, [0, 2**62, 2**62])}, b"", "x is no valid"),
    ({"a": _entry(0, 4, [1] * 65)}, bytes(4), "x is no valid"),
    ({"a": _entry(0, 16, [3])}, _FOUR, "takes 12 bytes"),
    ({"a": _entry(0, 16, [4], "F64")}, _FOUR, "takes 32 bytes"),
    ({"a": _entry(16, 0, [4])}, _FOUR, "takes 16 bytes"),
    ({"a": _entry(-16, 0, [4])}, _FOUR, r"data_offsets=\[-16, 0\]"),
    ({"a": {**_entry(0, 16, [4]), "data_offsets": [0, 16, 16]}}, _FOUR, "0, 16, 16"),
    ({"a": _entry(4, 20, [4])}, bytes(20), "a begins at 4, not at 0"),
    ({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, bytes(12), "begins at 8, not"),
    ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, bytes(12), "begins at 4, not"),
    ({"a": _entry(0, 8, [2]), "b": _entry(0, 8, [2])}, bytes(8), "begins at 0, not"),
    ({"a": _entry(0, 16, [4])}, bytes(15), "its tensors end at"),
    ({"a": _entry(0, 16, [4])}, bytes(17), "its tensors end at"),
    ({}, bytes(1), "its tensors end at"),
])
def test_what_the_format_forbids_is_refused(tmp_path, header, values, message):
    path = _file(tmp_path / "x", header, values)
    with pytest.raises(ValueError, match=message) as error:
        safetensors_file.read(path)
    assert str(error.value).startswith(f"{path} is no valid safetensors file: ")
    if header not in _ONLY_HERE:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)


def test_a_header_begins_with_a_brace(tmp_path):
    with pytest.raises(ValueError, match="no JSON object"):
        safetensors_file.read(_file(tmp_path / "x", b" {}"))


@pytest.mark.parametrize("content", [
    b"", b"\x02\0\0\0", b"\x03\0\0\0\0\0\0\0{}", b"\xff" * 8 + b"{}", b"{}" * 20,
])
def test_a_header_that_is_not_in_the_file_is_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a header of .* bytes in a file of"):
        safetensors_file.read(path)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = _file(tmp_path / "x", b"{}", length=100_000_001)
    with path.open("ab") as file:
        file.truncate(200_000_000)
    with pytest.raises(ValueError, match="where at most 100000000 are allowed"):
        safetensors_file.read(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    values = {"a": np.arange(6.0), "b": np.zeros((2, 0)), "c": np.zeros(70, np.int8)}
    whole = _write(tmp_path / "whole", values, {"d": "e"}).read_bytes()
    path = tmp_path / "short"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=str(path)):
            safetensors_file.read(path)


def test_any_changed_byte_is_read_or_an_error_of_value(tmp_path):
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(5, dtype=np.int8)}
    whole = _write(tmp_path / "whole", values, {"c": "d"}).read_bytes()
    dice = random.Random(0)
    path = tmp_path / "changed"
    for position in list(range(len(whole))) * 3:
        changed = bytearray(whole)
        changed[position] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            ours, _ = safetensors_file.read(path)
        except ValueError:
            continue
        assert all(value.read().shape == value.shape for value in ours.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file .*gone"):
        safetensors_file.read(Path(tmp_path / "gone"))


def test_what_the_format_has_no_place_for_is_not_written(tmp_path):
    for values in ({"x": np.zeros(2, np.complex64)}, {"x": np.zeros(2, ">f4")},
                   {"__metadata__": np.zeros(2)}):
        with pytest.raises(ValueError, match="has no place for .*Known types: F64"):
            _write(tmp_path / "x", values)
    assert not (tmp_path / "x").exists()


# crossmae_jax.convert.files.tensor: what both kinds of files hand out.


def test_a_change_of_a_tensor_is_described_without_reading():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    reads = []
    lazy = tensor.Tensor(
        (2, 3), np.dtype(np.float32), lambda: reads.append(1) or values
    )
    changed = lazy.then(lambda x: x.T[None]).then(lambda x: x.astype(np.float16))
    assert (changed.shape, changed.dtype, changed.size) == ((1, 3, 2), np.float16, 6)
    assert not reads
    found = changed.read()
    assert found.flags.c_contiguous and len(reads) == 1
    np.testing.assert_array_equal(found, values.T[None].astype(np.float16))
    changed.read()
    assert len(reads) == 2, "nothing keeps what was read"


def test_a_change_of_a_huge_tensor_takes_no_memory():
    huge = tensor.Tensor((2**20, 2**20), np.dtype(np.float64), lambda: None)
    assert huge.then(lambda x: x[:, None].swapaxes(0, 2)).shape == (2**20, 1, 2**20)
    assert huge.size == 2**40


def test_a_tensor_of_a_file_is_read_from_its_place(tmp_path):
    path = tmp_path / "values"
    values = np.arange(24, dtype=np.int16).reshape(4, 6)
    path.write_bytes(b"abc" + values.tobytes() + b"def")

    def read(shape, offset, strides=None):
        found = tensor.of_file(
            path, np.dtype(np.int16), shape, offset=3 + 2 * offset, strides=strides
        ).read()
        assert found.flags.c_contiguous
        return found

    np.testing.assert_array_equal(read((4, 6), 0), values)
    np.testing.assert_array_equal(read((), 5), 5)
    np.testing.assert_array_equal(read((2, 3), 7), values.ravel()[7:13].reshape(2, 3))
    np.testing.assert_array_equal(read((6, 4), 0, (1, 6)), values.T)
    np.testing.assert_array_equal(read((2, 2), 1, (12, 3)), values[::2, 1::3][:, :2])
    assert read((0, 3), 0).shape == (0, 3)
