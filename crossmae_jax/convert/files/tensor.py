"""A tensor of a file that is read when it is asked for, not before.

Files of weights are opened, renamed, brought into other layouts and written again one
tensor at a time. What lies between is a mapping from names to `Tensor`s; a whole model
never has to be in memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Shape and type of a tensor, and how to get its values.

    Attributes:
      read: returns the values, in row-major order; each call reads anew, and nothing
        keeps what it returned.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def raw(self) -> np.ndarray:
        """Returns the values as bytes, in row-major order."""
        values = np.ascontiguousarray(self.read())
        assert (values.dtype, values.size) == (self.dtype, self.size)
        return values.reshape(-1).view(np.uint8)

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """Returns the tensor with `change` applied whenever it is read."""
        # The change of the shape is that of a constant that takes no memory.
        like = change(np.broadcast_to(np.zeros((), self.dtype), self.shape))
        return Tensor(
            like.shape, like.dtype, lambda: np.ascontiguousarray(change(self.read()))
        )


Tensors = Mapping[str, Tensor]


def of_array(values: np.ndarray) -> Tensor:
    """Returns a tensor whose values are in memory already."""
    return Tensor(values.shape, values.dtype, lambda: values)


def of_file(
    path: Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    offset: int,
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Returns a tensor that lies at `offset` bytes in a file, little-endian.

    Args:
      strides: steps between values along each axis, in values and not negative; None
        for row-major order.
    """
    dtype = np.dtype(dtype)

    def values(count: int) -> np.ndarray:
        # As bytes: NumPy reads no bfloat16 from files.
        raw_bytes = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset)
        return raw_bytes.view(dtype)

    def read() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        if strides is None:
            return values(int(np.prod(shape))).reshape(shape)
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        steps = tuple(step * dtype.itemsize for step in strides)
        view = np.lib.stride_tricks.as_strided(values(last + 1), shape, steps)
        return np.ascontiguousarray(view)

    return Tensor(tuple(shape), dtype, read)
