"""Reads PyTorch checkpoints (`.pth`) without PyTorch and without running their code.

A `.pth` file is a zip archive: a pickle that describes objects, and one raw file per
tensor storage. Unpickling calls whatever the pickle names, so only the names below are
honoured; anything else is refused before it is imported. The argument namespace that
training scripts store becomes a plain dictionary.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGE_TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Namespace(dict):
    """Stands in for `argparse.Namespace`: its attributes become items."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


def _rebuild_tensor(storage, offset, size, stride, *_unused) -> np.ndarray:
    steps = tuple(step * storage.itemsize for step in stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1
    if offset < 0 or min((*size, *stride, 0)) < 0 or (
        0 not in size and last > storage.size
    ):
        raise pickle.UnpicklingError(
            f"tensor of size {size} and stride {stride} at {offset} reaches outside "
            f"its storage of {storage.size} values"
        )
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps)
    return view.copy()


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): _Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_unused: data,
    **{("torch", name): dtype for name, dtype in _STORAGE_TYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is not needed for weights"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _device, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown external object {kind!r}")
        if key not in self._storages:
            data = self._archive.read(f"{self._root}/data/{key}")
            if len(data) < count * np.dtype(dtype).itemsize:
                raise EOFError(f"storage {key} holds {len(data)} bytes")
            self._storages[key] = np.frombuffer(data, dtype, count=count)
        return self._storages[key]


def read(path: str | Path) -> Any:
    """Returns the object in a `.pth` file: tensors as arrays, namespaces as dicts.

    Raises:
      ValueError: if the file is not a zip archive of PyTorch >= 1.6, or names anything
        but tensors, containers and an argument namespace.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No checkpoint {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a zip archive as PyTorch >= 1.6 writes: it is cut short "
            "or older. Copy it again, or load it in PyTorch and save it with "
            "torch.save."
        )
    with zipfile.ZipFile(path) as archive:
        roots = [name[: -len("/data.pkl")] for name in archive.namelist()
                 if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(
                f"{path} is a zip archive but not a PyTorch checkpoint: expected one "
                f"data.pkl inside, found {len(roots)}."
            )
        order = f"{roots[0]}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError(
                f"{path} was written on a big-endian machine; save it again on another."
            )
        try:
            return _Unpickler(archive, roots[0]).load()
        except (KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} was refused: {error}. Only tensors, containers and an "
                "argument namespace are read; nothing in the file was executed."
            ) from error
