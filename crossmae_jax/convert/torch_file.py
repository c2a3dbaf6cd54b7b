"""Reads and writes PyTorch checkpoints (`.pth`) without PyTorch, and runs no code.

A `.pth` file is a pickle that describes objects, and the raw bytes of every storage:
since PyTorch 1.6 as uncompressed entries of a zip archive, before that one after
another behind the pickle. Python's own unpickler calls whatever a pickle names. Here
the instructions are interpreted, and only those names are known that weights,
optimizer states and the arguments of training scripts need. Others are refused.

    tensor, parameter                       tensor.Tensor, which reads when asked
    argparse.Namespace, OrderedDict         dictionaries
    torch.Size, NumPy scalar                tuple, number
    torch.device, torch.dtype, a path       strings

Tensors are described and not read, so that a file larger than memory can be taken
apart; for the same reason the checksums of a zip archive are not verified.
"""

import dataclasses
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Sized
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from crossmae_jax.convert import tensor
from crossmae_jax.convert.tensor import Tensor, Tensors

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_DTYPES = {f"torch.{dtype.name}" for dtype in _STORAGES.values()}

_ZIP = b"PK\x03\x04"
_LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_SAVE_AGAIN = "Load it in PyTorch >= 1.6 and save it again with torch.save."
_ALIGNMENT = 64  # bytes, as in torch.save: mmap=True uses storages where they lie
_HEADER = struct.Struct("<4s22xHH")  # of a zip entry; its name and extra field follow


class _Unfit(Exception):
    """What is wrong with a file that may be whole; reads on after its name."""


def _refused(what: str) -> _Unfit:
    return _Unfit(
        f"was refused: {what}. Only tensors, containers and the arguments of a run are "
        "read; nothing in the file was executed."
    )


class _Namespace(dict):
    """Stands in for `argparse.Namespace`: its attributes become items."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    path: Path
    dtype: np.dtype
    start: int
    count: int


# What follows takes values from the file, which may be of any type.


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _row_major(shape):
    return tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))


def _tensor(storage, offset, size, stride, _requires_grad, _hooks, metadata=None):
    if metadata:
        raise _refused("a tensor is a conjugate or negative view")
    if not all(map(_is_count, (offset, *size, *stride))):
        raise ValueError("a tensor with a size, stride or offset that is no count")
    shape = np.broadcast_to(np.zeros(()), size).shape  # within NumPy's own limits
    axes = list(zip(shape, stride, strict=True))
    values = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in axes) if values else -1
    if last >= storage.count or values > storage.count:
        raise _refused(
            f"a tensor of {size=} and {stride=} at {offset=} reaches outside its "
            f"storage of {storage.count} values, or repeats them (call contiguous() "
            "on such a tensor before torch.save)"
        )
    return tensor.of_file(
        storage.path, storage.dtype, shape,
        offset=storage.start + offset * storage.dtype.itemsize,
        # Of an axis of one any step is valid, and some are too long for NumPy.
        strides=None if tuple(stride) == _row_major(shape) else tuple(
            0 if n == 1 else step for n, step in axes
        ),
    )


def _set_item(items, key, value) -> None:
    # No tuples: Python's hash of deeply nested ones overflows the stack.
    if not isinstance(items, dict) or not isinstance(key, str | int | float | None):
        kinds = type(items).__name__, type(key).__name__
        raise _refused("it sets an item of a {} by a key of type {}".format(*kinds))
    items[key] = value


def _dict(pairs=()):
    items: dict[Any, Any] = {}
    for key, value in pairs:
        _set_item(items, key, value)
    return items


def _scalar_dtype(name, _align, _copy):
    if not re.fullmatch("[biuf][1248]", name):
        raise _refused(f"a NumPy value has the type {name}")
    return np.dtype(name)


def _scalar(dtype, data):
    if not isinstance(dtype, np.dtype) or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar has the wrong size")
    return np.frombuffer(data, dtype)[0].item()


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, _requires_grad, _hooks: data,
    "torch.Size": lambda counts: tuple(counts),
    "torch.device": lambda kind, *index: ":".join((kind, *map("{:d}".format, index))),
    "collections.OrderedDict": _dict,
    "argparse.Namespace": lambda: _Namespace(),
    "__builtin__.set": lambda values: set(_dict((v, None) for v in values)),
    "pathlib.PosixPath": lambda *parts: str(PurePosixPath(*parts)),
    "pathlib._local.PosixPath": lambda *parts: str(PurePosixPath(*parts)),
    "_codecs.encode": lambda text, _latin1: text.encode("latin1"),  # bytes
    "numpy.dtype": _scalar_dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


def _build(target, state) -> None:
    if isinstance(target, _Namespace):
        target.update(_dict(state.items()))
    elif isinstance(target, np.dtype):
        if state[1] not in ("<", "|"):
            raise _Unfit(f"holds big-endian NumPy scalars. {_SAVE_AGAIN}")
    elif not isinstance(target, dict):  # whose attributes, as _metadata, are dropped
        raise _refused(f"it sets attributes of type {type(target).__name__}")


def _storage(path, place, kind, name, key, _location, count, view=None):
    if kind != "storage" or not (isinstance(name, str) and isinstance(key, str)):
        raise _refused("it refers to something outside of it that is no storage")
    if not _is_count(count):
        raise ValueError(f"storage {key} has a size that is no count")
    dtype = _STORAGES[name]
    start, stop = place(key, dtype.itemsize)
    if count * dtype.itemsize > stop - start:
        raise ValueError(f"storage {key} is too short for {count} values of {dtype}")
    if view is not None:  # of another storage, as PyTorch < 0.4 had them
        _key, offset, length = view
        if not (_is_count(offset) and _is_count(length) and offset + length <= count):
            raise ValueError(f"a view of storage {key} reaches outside of it")
        start, count = start + offset * dtype.itemsize, length
    return _Storage(path, dtype, start, count)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING",
}
_TAKES = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "REDUCE": 2,
    "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1,
}


def _unpickle(stream, path, place):
    """Returns what the next pickle of a stream describes.

    Args:
      place: from the key of a storage and the size of its values to where it begins
        and ends.
    """
    stack, outer, memo, items, copied = [], [], {}, [], 0
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, outer.pop()
        elif count := _TAKES.get(name):
            items, stack[-count:] = stack[-count:], []
        if name in ("REDUCE", "NEWOBJ", "BUILD"):
            sizes = (len(a) for a in (items[-1], *items[-1]) if isinstance(a, Sized))
            copied += sum(sizes)
            if copied > len(stream):  # one long object, copied again and again
                raise _refused("what it describes is larger than itself")
        match name:
            case "PROTO" if argument != 2:
                raise _Unfit(f"is a pickle of protocol {argument}. {_SAVE_AGAIN}")
            case "PROTO" | "STOP":
                pass
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if name == "EMPTY_LIST" else {})
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set_item(stack[-1], key, value)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                named = argument.replace(" ", ".")
                if not (named in _CALLS or named in _STORAGES or named in _DTYPES):
                    raise _refused(f"it names {named}, not needed for weights")
                stack.append(named)
            case "BINPERSID":
                stack.append(_storage(path, place, *items[0]))
            case "REDUCE" | "NEWOBJ":
                called, arguments = items
                if not isinstance(called, str) or called not in _CALLS:
                    raise _refused(f"it calls a value of type {type(called).__name__}")
                stack.append(_CALLS[called](*arguments))
            case "BUILD":
                _build(stack[-1], *items)
            case _:
                raise _refused(f"its pickle has the instruction {name}")
    return stack.pop()


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [n[:-len("data.pkl")] for n in names if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Unfit(
                "is a zip archive but not a PyTorch checkpoint: expected one data.pkl "
                f"inside, found {len(roots)}."
            )

        def place(name: str) -> tuple[int, int]:
            info = archive.getinfo(roots[0] + name)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise _Unfit(f"has {name} compressed or encrypted. {_SAVE_AGAIN}")
            header = max(info.header_offset, 0)
            signature, *more = _HEADER.unpack_from(data, header)
            start = header + _HEADER.size + sum(more)
            if signature != _ZIP or start + info.file_size > len(data):
                raise ValueError(f"{name} is not where the archive says")
            return start, start + info.file_size

        if roots[0] + "byteorder" in names:
            if data[slice(*place("byteorder"))] != b"little":
                raise _Unfit("was written on a big-endian machine; save it on another.")
        data.seek(place("data.pkl")[0])
        return _unpickle(data, path, lambda key, _itemsize: place(f"data/{key}"))


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    itemsizes: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}

    def expect(key: str, itemsize: int) -> tuple[int, int]:
        itemsizes.setdefault(key, itemsize)
        return 0, 2**63

    _magic, protocol, system = (_unpickle(data, path, expect) for _ in range(3))
    if protocol != 1001 or system["little_endian"] is not True:
        raise _Unfit("is of another protocol than 1001, or of a big-endian machine.")
    begin = data.tell()
    _unpickle(data, path, expect)  # for the keys: where storages lie comes after them
    keys = _unpickle(data, path, expect)
    position = data.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage has no name")
        count = int.from_bytes(data[position:position + 8], "little")
        places[key] = position + 8, position + 8 + count * itemsizes[key]
        position = places[key][1]
        if position > len(data):
            raise ValueError(f"storage {key} ends after the file")
    data.seek(begin)
    return _unpickle(data, path, lambda key, _itemsize: places[key])


def read(path: str | Path) -> Any:
    """Returns what a `.pth` file holds: lazy tensors, and namespaces as dictionaries.

    Raises:
      ValueError: if the file is damaged, or names anything but tensors, containers
        and the arguments of a run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint {path}.")
    try:
        with path.open("rb") as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ
        ) as data:
            if data[:4] == _ZIP:
                return _read_zip(path, data)
            if _LEGACY in data[:32]:
                return _read_legacy(path, data)
            if data[257:262] == b"ustar":
                raise _Unfit(f"is a tar archive of the first PyTorch. {_SAVE_AGAIN}")
            raise _Unfit(
                "does not begin as a file of torch.save; is it cut short, a page or a "
                "pointer of Git LFS that was downloaded in its place, or compressed?"
            )
    except _Unfit as error:
        raise ValueError(f"{path} {error}") from error
    except (  # in which the interpretation of a pickle without sense can end
        AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
        struct.error, zipfile.BadZipFile,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}). Copy it again.") from error


def _plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without its first and last opcode


def _described(value: Tensor, number: int) -> bytes:
    storages = [name for name, dtype in _STORAGES.items() if dtype == value.dtype]
    if not storages:
        known = ", ".join(dtype.name for dtype in _STORAGES.values())
        raise ValueError(f"PyTorch has no storage for {value.dtype}. Known: {known}.")
    return b"".join((
        b"ctorch._utils\n_rebuild_tensor_v2\n((", _plain("storage"),
        f"c{storages[0].replace('.', chr(10))}\n".encode(), _plain(str(number)),
        _plain("cpu"), _plain(value.size), b"tQ", _plain(0), _plain(value.shape),
        _plain(_row_major(value.shape)), _plain(False),
        b"ccollections\nOrderedDict\n)RtR",
    ))


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: Any) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    large = len(content) > zipfile.ZIP64_LIMIT
    begin = file.tell() + _HEADER.size + len(info.filename) + 4 + (20 if large else 0)
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack(f"<2sH{padding}x", b"FB", padding)  # as torch.save
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(content)


def _raw(value: Tensor) -> np.ndarray:
    values = np.ascontiguousarray(value.read())
    assert (values.dtype, values.size) == (value.dtype, value.size)
    return values.reshape(-1).view(np.uint8)


def write(path: str | Path, content: dict[str, str | Tensors]) -> None:
    """Writes strings and tensors by name as `torch.load` reads them (PyTorch >= 1.6).

    One tensor at a time is in memory; `weights_only=True` and `mmap=True` work.
    """
    tensors: list[Tensor] = []
    description = [b"\x80\x02}("]
    for key, value in content.items():
        description.append(_plain(key))
        if isinstance(value, str):
            description.append(_plain(value))
            continue
        description.append(b"ccollections\nOrderedDict\n)R(")
        for name, described in value.items():
            description += _plain(name), _described(described, len(tensors))
            tensors.append(described)
        description.append(b"u")
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            _add(archive, file, "data.pkl", b"".join((*description, b"u.")))
            _add(archive, file, "byteorder", b"little")
            for number, value in enumerate(tensors):
                _add(archive, file, f"data/{number}", _raw(value))
            _add(archive, file, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())
