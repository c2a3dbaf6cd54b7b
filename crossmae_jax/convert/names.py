"""Tensors by our names: whether they fit a model, and errors if they do not.

Our names are paths in the model's variables without the collection:
"encoder/blocks_3/attn/qkv/kernel". What other formats call them is `spellings`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from crossmae_jax import errors
from crossmae_jax.convert import spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.files.tensor import Tensor, Tensors


class ConversionError(errors.UserError, ValueError):
    """A file of weights is not what it should be, or cannot become what was asked."""


class Untold(ConversionError):
    """Weights cannot be taken before something is said about them.

    Attributes:
      flags: of `convert import`, that say it.
    """

    def __init__(self, message: str, *, flags: str):
        super().__init__(message)
        self.flags = flags


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Marks the errors of settings that are of another form than code was written for.

    Settings in files of strangers may be anything; which errors that leads to is past
    listing each.

    Args:
      what: they are in, and what they are not, for the message.
    """
    try:
        yield
    except ConversionError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, TypeError,
        ValueError,
    ) as error:
        raise ConversionError(
            f"{what} ({type(error).__name__}: {error}); it was written by another "
            "version of the library, or changed by hand."
        ) from error


def listing(title: str, lines: Iterable[str]) -> str:
    """Returns lines under their title and number, indented; "" if there are none."""
    lines = list(lines)
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(lines) if lines else ""


def without_collections(variables: Any) -> dict[str, Any]:
    """Returns the leaves of a model's variables by our names."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {name.partition("/")[2]: leaf for name, leaf in flat.items()}


def tensors_of(variables: Any) -> dict[str, Tensor]:
    """Returns a model's variables as tensors under our names."""
    return {
        name: Tensor(
            leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: np.asarray(leaf)
        )
        for name, leaf in without_collections(variables).items()
    }


def variables_of(
    tensors: Tensors, like: Any, *, table: spellings.Table = (),
    left_over: Iterable[str] = (), reason: str = "",
) -> Any:
    """Reads tensors into the variables of a model, if names and shapes agree exactly.

    Tensors get the model's types: a half-precision file gives float32 parameters.

    Args:
      like: the variables as arrays or `jax.ShapeDtypeStruct`s.
      table: gives the names that an error lists; ours if there is none.
      left_over: names in the file that have none of ours.
      reason: what the user probably mixed up.

    Raises:
      ConversionError: lists every tensor too many, too few or of another shape.
    """
    expected = without_collections(like)
    check_match(
        tensors, {name: leaf.shape for name, leaf in expected.items()},
        table=table, left_over=left_over, reason=reason,
    )
    flat = traverse_util.flatten_dict(like, sep="/")
    return traverse_util.unflatten_dict({
        path: tensors[path.partition("/")[2]].read().astype(leaf.dtype)
        for path, leaf in flat.items()
    }, sep="/")


def attends_across(ours: Iterable[str]) -> bool:
    """Returns whether tensors are of a decoder with cross-attention: CrossMAE's."""
    return "decoder/decoder_blocks_0/cross_attn/q/bias" in ours


def check_match(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], *,
    table: spellings.Table = (), left_over: Iterable[str] = (), reason: str = "",
) -> None:
    """Raises ConversionError unless tensors and expected shapes agree exactly."""

    def called(name):
        return ", ".join(spellings.their_names(table, name)) or name

    missing = [called(name) for name in shapes if name not in tensors]
    unexpected = [*left_over, *(called(n) for n in tensors if n not in shapes)]
    misshaped = [
        f"{called(name)}: {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if missing or unexpected or misshaped:
        raise ConversionError(
            "The weights do not fit the model."
            + listing("only in the model", missing)
            + listing("only in the file", unexpected)
            + listing("of another shape, in our layout", misshaped)
            + (f"\nLikely reason: {reason}." if reason else "")
        )


def zero_class_row(table: Tensor) -> Tensor:
    """Returns a position table with zeros for the class token.

    CrossMAE's reference never adds that row, ours always does. Released files hold
    zeros there; a table of another origin may not.
    """
    return tensor.Tensor(table.shape, table.dtype, lambda: _zeroed(table.read()))


def _zeroed(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(values[:1]), values[1:]])
