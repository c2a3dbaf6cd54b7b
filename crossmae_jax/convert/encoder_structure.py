"""What bare tensors tell of an encoder: width, depth, patches, and how it tells places.
"""

import math
import re
from typing import Any

from crossmae_jax.convert import of_swin
from crossmae_jax.convert.files.tensor import Tensors
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError, Untold
from crossmae_jax.models import relative_bias, vit

_SHARED_BIAS, _BIAS_OF_BLOCK = (
    f"encoder/relative_bias{number}/table" for number in ("", "_0")
)


def settings(
    tensors: Tensors, patch: tuple[int, ...], facts: Facts, fallback: Facts,
    evidence: list[str], assumed: dict[str, str],
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Returns `config.model.encoder`, and the size of the images."""
    if of_swin.is_one(tensors):
        return of_swin.settings(tensors, patch, facts, evidence, assumed)
    depth = depth_of(tensors, "encoder/blocks_")
    dim, channels, patch_size = patch[0], patch[1], patch[2]
    own = _options_of_simmim(tensors, dim)
    needed = {"encoder/cls_token": 3, "encoder/blocks_0/mlp/fc1/bias": 1}  # with ranks
    if own.get("positions") != "none":
        needed["encoder/pos_embed"] = 2
    missing = [
        name for name, rank in needed.items()
        if name not in tensors or len(tensors[name].shape) != rank
    ]
    if patch[2] != patch[3]:
        missing.append("square patches")
    if missing:
        raise ConversionError(
            "This is no ViT as we build them, with a class token, a table of positions "
            f"or offsets, blocks and square patches; missing: {', '.join(missing)}."
        )
    size, heads = _size(dim, depth, facts, fallback, assumed)
    image_size, grid = _image_size(
        _num_patches(tensors, patch_size, facts, fallback), patch_size, facts, fallback,
        assumed,
    )
    evidence.append(
        f"encoder: width {dim}, depth {depth}, {heads} heads; patches of {patch_size}, "
        f"{channels} channels, {grid[0]} x {grid[1]} patches: {image_size[0]} x "
        f"{image_size[1]} px"
    )
    mlp_ratio = mlp_ratio_of(tensors, "encoder/blocks_0", dim)
    encoder = dict(kind="vit", size=f"{size}/{patch_size}", mlp_ratio=mlp_ratio)
    if own:
        evidence.append(", ".join(f"encoder.{name} {own[name]}" for name in own))
    return encoder | own, image_size


def _options_of_simmim(tensors: Tensors, dim: int) -> dict[str, Any]:
    """Returns the options in which an encoder is SimMIM's; {} of MAE's."""
    bias = tensors.get("encoder/blocks_0/attn/qkv/bias")
    biased = {None: "none", 2 * dim: "qv"}.get(bias and bias.shape[0], "qkv")
    relative = "shared" if _SHARED_BIAS in tensors else (
        "per_block" if _BIAS_OF_BLOCK in tensors else "none"
    )
    scaled = "encoder/blocks_0/gamma_1" in tensors
    mask_tokens = "encoder/mask_token" in tensors
    if (relative, scaled, mask_tokens) == ("none", False, False) and biased != "qv":
        return {}
    return dict(
        positions="learned" if "encoder/pos_embed" in tensors else "none",
        relative_bias=relative, qkv_bias=biased, mask_tokens=mask_tokens,
        layer_scale=0.1 if scaled else None,  # with which SimMIM's begins
        weight_init="truncated",
    )


def _num_patches(
    tensors: Tensors, patch_size: int, facts: Facts, fallback: Facts
) -> int:
    """Returns for how many patches there are positions or offsets."""
    if (table := tensors.get("encoder/pos_embed")) is not None:
        return max(table.shape[0] - 1, 0)
    table = tensors.get(_SHARED_BIAS) or tensors.get(_BIAS_OF_BLOCK)
    if table is None:
        raise ConversionError(
            "Nothing in this file tells places: it has neither positions nor biases of "
            "offsets."
        )
    for size in filter(None, (facts.image_size, fallback.image_size)):
        grid = tuple(length // patch_size for length in size)
        if relative_bias.num_rows(grid) == table.shape[0]:
            return math.prod(grid)
    side = (math.isqrt(max(table.shape[0] - relative_bias.OF_CLASS_TOKEN, 0)) + 1) // 2
    if relative_bias.num_rows((side, side)) != table.shape[0]:
        raise Untold(
            f"{table.shape[0]} biases of offsets are of no square; give image_size, the"
            " height and width in pixels: convert import --image_size=H,W.",
            flags="--image_size=H,W",
        )
    return side**2


def _size(
    dim: int, depth: int, facts: Facts, fallback: Facts, assumed: dict[str, str]
) -> tuple[str, int]:
    """Returns the size of the encoder as configs write it, and its number of heads."""
    known = {size[:2]: name for name, size in vit.SIZES.items()}.get((dim, depth))
    num_heads = facts.num_heads
    if num_heads is None and known:
        num_heads = vit.SIZES[known].num_heads
        assumed["num_heads"] = (
            f"{num_heads} heads of the encoder, as ViT-{known} has; give num_heads if "
            "not"
        )
    elif num_heads is None:
        num_heads = fallback.num_heads
        assumed["num_heads"] = f"{num_heads} heads of the encoder"
    if num_heads is None:
        raise Untold(
            f"Width {dim} and depth {depth} are no published size, so that the number "
            "of heads cannot be told from the tensors; give num_heads.",
            flags="--num_heads=N",
        )
    if known and num_heads == vit.SIZES[known].num_heads:
        return known, num_heads
    return f"W{dim}-D{depth}-H{num_heads}", num_heads


def _image_size(
    num_patches: int, patch_size: int, facts: Facts, fallback: Facts,
    assumed: dict[str, str],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns height and width in pixels and in patches."""
    side, size = math.isqrt(num_patches), facts.image_size
    square = side**2 == num_patches
    if size is None and square:
        if side > 1:
            assumed["image_size"] = (
                f"{num_patches} patches are a square of {side} x {side}; give "
                "image_size if not"
            )
        return (side * patch_size, side * patch_size), (side, side)
    if size is None and fallback.image_size is not None:
        rows, columns = (length // patch_size for length in fallback.image_size)
        if rows * columns == num_patches:
            size = fallback.image_size
            assumed["image_size"] = f"{num_patches} patches are {rows} x {columns}"
    if size is None:
        raise Untold(
            f"{num_patches} positions form no square; give image_size, the height and "
            "width in pixels that they are for: convert import --image_size=H,W."
            + _without_class_row(num_patches + 1, patch_size),
            flags="--image_size=H,W",
        )
    grid = tuple(length // patch_size for length in size)
    fits = all(length % patch_size == 0 for length in size)
    if not fits or grid[0] * grid[1] != num_patches:
        raise ConversionError(
            f"image_size={size} has {grid[0]} x {grid[1]} patches of "
            f"{patch_size} px, but the file has positions for {num_patches}."
        )
    return size, grid


def _without_class_row(rows: int, patch_size: int) -> str:
    """Says what size to give if the table has no row for the class token."""
    length = math.isqrt(rows) * patch_size
    return "" if math.isqrt(rows)**2 != rows else (
        f" If none of the table's {rows} rows is for the class token, as in DeiT III: "
        f"--image_size={length},{length}."
    )


def depth_of(tensors: Tensors, prefix: str) -> int:
    """Returns how many blocks there are, whose names begin so before their number.

    Raises:
      ConversionError: if one before the last is missing.
    """
    pattern = re.compile(rf"{prefix}(\d+)/")
    blocks = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    for number in range(len(blocks)):
        if number not in blocks:
            raise ConversionError(
                f"The file has blocks up to {max(blocks)}, but no {prefix}{number}."
            )
    return len(blocks)


def mlp_ratio_of(tensors: Tensors, block: str, dim: int) -> float:
    """Returns the hidden width of a block's MLP over `dim`, that of its tokens."""
    hidden = tensors[f"{block}/mlp/fc1/bias"].shape[0]
    if int(dim * (hidden / dim)) != hidden:  # rounded down to just below, as 240 / 176
        return (hidden + 0.5) / dim
    return hidden / dim
