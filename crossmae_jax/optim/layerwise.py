"""What the place of a parameter in the encoder decides, when it is fine-tuned.

Layers count from the image: 0 makes the tokens (class token, positions, patch
projection), i + 1 is block i with a relative position bias of its own and, of a Swin,
what merges cells behind it, and depth + 1 is everything else (final norm, pooling norm,
head; a bias that all blocks share, which is tuned only with all of them).

Layer-wise decay: the rate of a layer is that of the head times

    decay ^ (depth + 1 - layer)

(ELECTRA, arXiv 2003.10555; MAE, arXiv 2111.06377, appendix A.1, and `util/lr_decay.py`
of its code). The whole rate has the factor: that of warm-up and the last one, too.

Partial fine-tuning (MAE, section 4.3) tunes the last blocks with all that follows them.
What is frozen gets an update of exactly zero and has no optimiser state.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

_TOKENS = re.compile(
    r"encoder/(cls_token|cls_token_mlp|mask_token|pos_embed|patch_embed)(/|$)"
)
_BLOCK = re.compile(r"encoder/(?:blocks|relative_bias|downsample)_(\d+)/(\w+)")
_SHARED = "encoder/relative_bias/"
_ANY_BLOCK = re.compile(r".*?blocks_\d+(?=/|$)")


def names(params: Any) -> Any:
    """Returns a tree with the name of each parameter, "encoder/blocks_3/norm1/bias"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def part(name: str) -> str:
    """Returns the part of a model that a tensor or module is of.

    That is its block, "decoder/blocks_3", or outside of blocks its module, down to the
    second level: "encoder/patch_embed", "head"; "encoder" of its tokens.
    """
    if block := _ANY_BLOCK.match(name):
        return block[0]
    *modules, tensor = name.split("/")
    return "/".join(modules[:2]) or tensor


def norms(tree: Any, *, prefix: str = "") -> dict[str, Float[Array, ""]]:
    """Returns the length of what a tree has of each part of a model, by its name."""
    squares: dict[str, Array] = {}
    for name, x in zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree)):
        square = jnp.sum(jnp.square(x.astype(jnp.float32)))
        squares[part(name)] = squares.get(part(name), 0.0) + square
    return {f"{prefix}{name}": jnp.sqrt(square) for name, square in squares.items()}


def _layer(name: str, depth: int) -> int:
    if _TOKENS.match(name):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


def lr_scales(params: Any, *, decay: float, depth: int) -> Any:
    """Returns a tree with the factor of each parameter's learning rate."""
    return jax.tree.map(
        lambda name: decay ** (depth + 1 - _layer(name, depth)), names(params)
    )


def scale_by_layer(*, decay: float, depth: int) -> optax.GradientTransformation:
    """Returns the last part of an optimiser with layer-wise decay of its rate.

    Raises:
      ValueError: if the decay is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise ValueError(
            f"optim.layer_decay={decay} must be above 0 and at most 1, with which all "
            "layers have the same rate."
        )

    def scale(updates, _params):
        scales = lr_scales(updates, decay=decay, depth=depth)
        return jax.tree.map(lambda update, factor: factor * update, updates, scales)

    return optax.stateless(scale)


def is_tuned(params: Any, *, tune_blocks: float | None, depth: int) -> Any:
    """Returns a tree that is True for each parameter that is trained.

    Args:
      tune_blocks: 0 trains what lies outside the encoder: the head and the norm of a
        mean; 0.5 also the final norm and, of the last block, the MLP with its norm;
        n the final norm and the last n blocks. `depth` and None train everything,
        tokens, positions and patch projection included.

    Raises:
      ValueError: for any other number.
    """
    check_blocks(tune_blocks, depth)
    if tune_blocks is None or tune_blocks == depth:
        return jax.tree.map(lambda _: True, params)

    def tuned(name):
        if not name.startswith("encoder/"):
            return True
        if name.startswith(_SHARED):
            return False
        layer = _layer(name, depth)
        if tune_blocks == 0.5 and layer == depth:
            return _BLOCK.match(name)[2] in ("norm2", "mlp")
        return tune_blocks > 0 and layer > depth - int(tune_blocks)

    return jax.tree.map(tuned, names(params))


def check_blocks(tune_blocks: float | None, depth: int) -> None:
    """Raises ValueError for a number of blocks that an encoder cannot be tuned by."""
    if tune_blocks not in (None, 0.5, *range(depth + 1)):
        raise ValueError(
            f"tune_blocks={tune_blocks}; expected 0, 0.5 (the MLP of the last "
            f"block) or a whole number of blocks, at most the encoder's {depth}."
        )


def stop_frozen(params: Any, *, tune_blocks: float | None, depth: int) -> Any:
    """Returns the parameters, with no gradient to the frozen ones.

    For use in a loss: nothing below the first trained layer is then computed backwards,
    and the norm of the gradient is that of the trained parameters.
    """
    return jax.tree.map(
        lambda x, tuned: x if tuned else jax.lax.stop_gradient(x),
        params, is_tuned(params, tune_blocks=tune_blocks, depth=depth),
    )


def freeze(
    optimizer: optax.GradientTransformation, *, tune_blocks: float | None, depth: int
) -> optax.GradientTransformation:
    """Returns an optimiser of the trained parameters only.

    It sees nothing of the others: a clipped norm is that of the trained ones.

    Raises:
      ValueError: if an encoder of this depth has no such blocks.
    """
    check_blocks(tune_blocks, depth)

    def labels(params):
        tuned = is_tuned(params, tune_blocks=tune_blocks, depth=depth)
        return jax.tree.map(lambda yes: "tuned" if yes else "frozen", tuned)

    return optax.partition(
        {"tuned": optimizer, "frozen": optax.set_to_zero()}, labels
    )
