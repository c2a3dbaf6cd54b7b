"""Tables of positions and of relative position biases, for another grid of patches."""

import functools

from crossmae_jax.convert.files.tensor import Tensor
from crossmae_jax.models import posemb, relative_bias

_POSITIONS = ("encoder/pos_embed", "decoder/decoder_pos_embed")
_SHARED = "encoder/relative_bias/table"


def resize(
    tensors: dict[str, Tensor], *, grid: tuple[int, int], new_grid: tuple[int, int]
) -> list[str]:
    """Resizes every table that there is, in place; says which kinds, a phrase each."""
    if grid == new_grid:
        return []
    kinds = (
        ("position tables", posemb.resize, _POSITIONS),
        ("relative position biases", relative_bias.resize, [
            name for name in tensors
            if name.startswith("encoder/relative_bias") and name.endswith("/table")
        ]),
    )
    phrases, (rows, columns), (new_rows, new_columns) = [], grid, new_grid
    for title, function, names in kinds:
        there = [name for name in names if name in tensors]
        for name in there:
            tensors[name] = tensors[name].then(
                functools.partial(function, grid=grid, new_grid=new_grid)
            )
        if there:
            phrases.append(
                f"{title} {rows} x {columns} -> {new_rows} x {new_columns} patches"
            )
    return phrases


def windows(
    tensors: dict[str, Tensor], sides: tuple[int, ...], new_sides: tuple[int, ...]
) -> list[str]:
    """Resizes Swin's biases to windows of other sides, block by block, in place.

    That of a window one cell wide says nothing of neighbours, and one of two nothing of
    a curve: such are refused where they would have to be resized.
    """
    changed = []
    for i, (side, new_side) in enumerate(zip(sides, new_sides, strict=False)):
        name = f"encoder/blocks_{i}/attn/relative_position_bias_table"
        if name not in tensors or side == new_side:
            continue
        tensors[name] = tensors[name].then(functools.partial(
            relative_bias.resize, grid=(side, side), new_grid=(new_side, new_side),
            of_class_token=0,
        ))
        changed.append((side, new_side))
    return [
        f"relative position biases of {changed.count(pair)} blocks, windows "
        f"{pair[0]} -> {pair[1]}" for pair in sorted(set(changed))
    ]


def bias_for_each_block(tensors: dict[str, Tensor], *, depth: int) -> list[str]:
    """Gives each block a copy of the shared relative bias, as SimMIM's fine-tuning."""
    if _SHARED not in tensors:
        return []
    shared = tensors.pop(_SHARED)
    for i in range(depth):
        tensors[f"encoder/relative_bias_{i}/table"] = shared
    return [f"the shared relative position bias copied to each of {depth} blocks"]
