"""Names and layouts of PyTorch checkpoints.

Our modules carry the names of the references, so a format is a short table of renames
from our flat paths to theirs, and one change of layout per kind of tensor:

    matrix   out x in            <->  in x out
    conv     out x c x p x p     <->  (p p c) x out: our patch vectors are (p, p, c)
    table    1 x (1 + n) x d     <->  (1 + n) x d
    other    unchanged

Both key sets must be consumed exactly: a tensor too many, one too few or one of another
shape is an error that lists them all.
"""

import re
from collections.abc import Mapping
from typing import Any

import einops
import jax
import numpy as np
from flax import traverse_util

# MAE (facebookresearch/mae) and CrossMAE (TonyLianLong/CrossMAE) share one layout.
MAE_NAMES = (
    (r"^params/fusion/kernel$", "wfm/linear/kernel"),
    (r"^(params|constants)/(encoder|fusion|decoder)/", ""),
    (r"(blocks|norms)_(\d+)/", r"\1/\2/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)


def torch_name(path: str) -> str:
    """Returns the references' name for one of our flat paths ("params/encoder/...")."""
    for pattern, replacement in MAE_NAMES:
        path = re.sub(pattern, replacement, path)
    return path


def to_ours(path: str, value: np.ndarray) -> np.ndarray:
    """Returns one of their tensors in the layout of our tensor at `path`."""
    if path.endswith("patch_embed/proj/kernel"):
        return einops.rearrange(value, "out c p q -> (p q c) out")
    if path.endswith("/kernel"):
        return value.T
    if path.endswith("pos_embed"):
        return value[0]
    return value


def _listing(title: str, lines: list[str]) -> str:
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(lines) if lines else ""


def from_torch(state: Mapping[str, np.ndarray], like: Any) -> Any:
    """Returns `state` (a PyTorch state dict of arrays) in our names and layouts.

    Tensors get the model's types: a half-precision file gives float32 parameters.

    Args:
      state: tensors under the references' names.
      like: variables of our model, as arrays or `jax.ShapeDtypeStruct`; decides which
        tensors are expected and in which shapes.

    Raises:
      ValueError: unless names and shapes agree exactly; lists every difference.
    """
    expected = traverse_util.flatten_dict(like, sep="/")
    names = {path: torch_name(path) for path in expected}
    missing = [name for name in names.values() if name not in state]
    unexpected = [name for name in state if name not in set(names.values())]
    ours, misshaped = {}, []
    for path, name in names.items():
        if name in state:
            value = to_ours(path, np.asarray(state[name]))
            ours[path] = value.astype(expected[path].dtype)
            if ours[path].shape != expected[path].shape:
                misshaped.append(
                    f"{name}: {ours[path].shape}, expected {expected[path].shape}"
                )
    if missing or unexpected or misshaped:
        raise ValueError(
            "The checkpoint does not fit the model; check config.model against the "
            "checkpoint's own arguments (size, decoder, fusion, image size)."
            + _listing("only in the model", missing)
            + _listing("only in the checkpoint", unexpected)
            + _listing("of another shape, after our layout", misshaped)
        )
    return traverse_util.unflatten_dict(ours, sep="/")


def ignore_class_row(variables: Any) -> Any:
    """Zeroes the class row of the encoder's position table.

    CrossMAE's reference never adds that row, ours always does. Released files hold
    zeros there; a table of another origin may not.
    """

    def zero(path, value):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(
            "encoder/pos_embed"
        ):
            return np.concatenate([np.zeros_like(value[:1]), value[1:]])
        return value

    return jax.tree_util.tree_map_with_path(zero, variables)
