"""Reads and writes safetensors files one tensor at a time.

A file is the length of a header (8 bytes, little-endian), the header (JSON: type,
shape and place of every tensor, and strings under `__metadata__`), and the values of
the tensors one after another, without holes.

Why not the package: its writer wants all tensors in memory at once, and importing
weights must not need much more memory than the largest of them; its reader would then
save the few lines below, which check what the format demands.
https://huggingface.co/docs/safetensors
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.files.tensor import Tensor, Tensors

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ENTRY = {"dtype", "shape", "data_offsets"}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("it names something twice")
    return items


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(n) is int and 0 <= n < 2**63 for n in values
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header and where the values begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"a header of {length} bytes in a file of {size}, where at most "
                f"{_LONGEST_HEADER} are allowed"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from error
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Returns where a tensor begins and ends, once its entry is found valid."""
    if not isinstance(entry, dict) or not _ENTRY <= entry.keys():
        raise ValueError(f"{name} needs {', '.join(sorted(_ENTRY))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has {dtype=}; known are {', '.join(_DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has {shape=} and data_offsets={offsets}")
    # Takes no memory, and refuses what no array can be.
    nbytes = np.broadcast_to(np.zeros((), _DTYPES[dtype]), shape).nbytes
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{name} lies at data_offsets={offsets} but {shape=} of {dtype} takes "
            f"{nbytes} bytes"
        )
    return offsets[0], offsets[1]


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file, in the order they lie in, and its metadata.

    Raises:
      ValueError: if the file is not exactly what the format demands.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    try:
        header, begin = _header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("its __metadata__ has values that are no strings")
        places = {name: _place(name, entry) for name, entry in header.items()}
        end, tensors = 0, {}
        for name in sorted(places, key=places.__getitem__):
            if places[name][0] != end:
                raise ValueError(f"{name} begins at {places[name][0]}, not at {end}")
            shape, dtype = tuple(header[name]["shape"]), _DTYPES[header[name]["dtype"]]
            tensors[name] = tensor.of_file(path, dtype, shape, offset=begin + end)
            end = places[name][1]
        if begin + end != (size := path.stat().st_size):
            raise ValueError(f"its tensors end at {begin + end}, the file at {size}")
    except ValueError as error:
        raise ValueError(
            f"{path} is no valid safetensors file: {error}. It may be cut short; copy "
            "it again."
        ) from error
    return tensors, metadata


def write(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes tensors in the order of their names here, those of larger values first.

    One tensor at a time is in memory. Larger values come first so that all are aligned.
    """
    # `sorted` keeps the order of equals.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if dtype not in _NAMES or name == "__metadata__":
            raise ValueError(
                f"safetensors has no place for {name!r} of {dtype}. Known types: "
                f"{', '.join(_DTYPES)}; __metadata__ is no name for a tensor."
            )
        begin, end = end, end + tensors[name].size * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].raw())
        file.flush()
        os.fsync(file.fileno())
