"""Interprets the pickles of PyTorch checkpoints, and runs nothing that they name.

Python's own unpickler calls whatever a pickle names, and can be crashed or exhausted
before a list of what is allowed comes into play. Here the instructions are interpreted
one by one, and only those names are known that weights, optimizer states and the
arguments of training scripts need. Others are refused.

    tensor, parameter                       tensor.Tensor, which reads when asked
    argparse.Namespace, OrderedDict         dictionaries
    torch.Size, NumPy scalar                tuple, number
    torch.device, torch.dtype, a path       strings
"""

import dataclasses
import math
import pickletools
import re
from collections.abc import Callable, Sized
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from crossmae_jax.convert.files import tensor

STORAGES = {
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
_DTYPES = {f"torch.{dtype.name}" for dtype in STORAGES.values()}

SAVE_AGAIN = "Load it in PyTorch >= 1.6 and save it again with torch.save."


class Unfit(Exception):
    """What is wrong with a file that may be whole; reads on after its name."""


def _refused(what: str) -> Unfit:
    return Unfit(
        f"was refused: {what}. Only tensors, containers and the arguments of a run are "
        "read; nothing in the file was executed. If you trust it, let PyTorch save the "
        "weights alone: content = torch.load(PATH, weights_only=False), then "
        "torch.save({'model': content['model']}, NEW), or content.state_dict() where "
        "it holds a whole module."
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


def row_major(shape):
    """Returns the steps between values along each axis of a row-major tensor."""
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
        strides=None if tuple(stride) == row_major(shape) else tuple(
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
            raise Unfit(f"holds big-endian NumPy scalars. {SAVE_AGAIN}")
    elif not isinstance(target, dict):  # whose attributes, as _metadata, are dropped
        raise _refused(f"it sets attributes of type {type(target).__name__}")


def _storage(path, place, kind, name, key, _location, count, view=None):
    if kind != "storage" or not (isinstance(name, str) and isinstance(key, str)):
        raise _refused("it refers to something outside of it that is no storage")
    if not _is_count(count):
        raise ValueError(f"storage {key} has a size that is no count")
    dtype = STORAGES[name]
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


def unpickle(stream, path, place):
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
                raise Unfit(f"is a pickle of protocol {argument}. {SAVE_AGAIN}")
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
                if not (named in _CALLS or named in STORAGES or named in _DTYPES):
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
