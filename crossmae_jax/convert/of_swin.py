"""What is peculiar to files of a Swin: blocks by stage, windows, no class token.

microsoft's Swin and SimMIM's name what merges cells after the stage before it
(`layers.0.downsample`), timm after the stage behind it (`layers.1.downsample`). Heads
and windows are told by the tables of biases. The images' size is told by no tensor but
the masks of moved windows, which SimMIM's files hold: without them it is assumed that
the last stage is one window, as in every published model.
"""

import math
import re
from typing import Any

from crossmae_jax.convert import spellings
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensors
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError, Untold
from crossmae_jax.models import classifier, swin

BUFFERS = ("relative_position_index", "attn_mask")
_BLOCK = re.compile(r"(?:encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight")
_MERGING = re.compile(r"encoder/downsample_(\d+)/reduction/kernel")
_TABLE = "attn/relative_position_bias_table"
# timm's names of sizes; its windows and images are said by arguments.
_TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}


def format_of(names: Any) -> tuple[str, str] | None:
    """Returns the format of a Swin's names and the reason; None of other models."""
    if not any(_BLOCK.fullmatch(name) for name in names):
        return None
    if any(".layers.0.downsample." in f".{name}" for name in names):
        return "simmim", "names like layers.0.downsample, of SimMIM's and Swin's code"
    return "timm", "names like layers.1.downsample, of timm's Swin"


def tables(names: Any) -> tuple[spellings.Table, ...]:
    """Returns the tables of names that a Swin's file may have; none of other models."""
    found = [match for name in names if (match := _BLOCK.fullmatch(name))]
    if not found:
        return ()
    stages = 1 + max(int(match[1]) for match in found)
    depths = tuple(
        len({match[2] for match in found if int(match[1]) == stage})
        for stage in range(stages)
    )
    if 0 in depths:
        raise ConversionError(
            f"The file has blocks of stage {stages}, but none of stage "
            f"{depths.index(0) + 1}."
        )
    return (
        spellings.simmim_swin(depths), spellings.simmim_swin_classifier(depths),
        spellings.timm_swin(depths),
    )


def is_one(tensors: Tensors) -> bool:
    """Returns whether tensors under our names are a Swin's."""
    return f"encoder/blocks_0/{_TABLE}" in tensors


def settings(
    tensors: Tensors, patch: tuple[int, ...], facts: Facts, evidence: list[str],
    assumed: dict[str, str],
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Returns `config.model.encoder`, and the size of the images."""
    depth = 1 + max(
        int(name.split("/")[1].removeprefix("blocks_")) for name in tensors
        if name.startswith("encoder/blocks_")
    )
    ends = sorted(1 + int(m[1]) for name in tensors if (m := _MERGING.fullmatch(name)))
    bounds = [0, *ends, depth]
    depths = [b - a for a, b in zip(bounds, bounds[1:])]
    first = [tensors.get(f"encoder/blocks_{i}/{_TABLE}") for i in bounds[:-1]]
    hidden = tensors.get("encoder/blocks_0/mlp/fc1/bias")
    wrong = None in first or hidden is None or patch[2] != patch[3] or min(depths) < 1
    if wrong or any(len(table.shape) != 2 for table in first):
        raise ConversionError(
            "This is no Swin as we build them, with a table of biases and an MLP in "
            "each block, stages of one block or more, and square patches."
        )
    heads = [table.shape[1] for table in first]
    sides = [(math.isqrt(table.shape[0]) + 1) // 2 for table in first]
    dim, stride = patch[0], patch[2] << len(depths) - 1
    window = max(sides)
    image_size = facts.image_size
    if image_size is None:
        image_size = (sides[-1] * stride,) * 2
        assumed["image_size"] = (
            f"the last stage is {sides[-1]} x {sides[-1]} cells, one window; give "
            "image_size if not"
        )
    size = _size(swin.Size(dim, tuple(depths), tuple(heads)), patch[2])
    made = _made(size, image_size, window)
    found = tuple(side for side, n in zip(sides, depths) for _ in range(n))
    if made.windows != found:
        raise Untold(
            f"Windows of {', '.join(map(str, sides))} cells in the stages are not those"
            f" of images of {image_size[0]} x {image_size[1]} px; give image_size, the "
            "height and width in pixels: convert import --image_size=H,W.",
            flags="--image_size=H,W",
        )
    evidence.append(
        f"encoder: {made.title}; width {dim}, blocks {depths}, heads {heads}; "
        f"{patch[1]} channels, {image_size[0]} x {image_size[1]} px"
    )
    return dict(
        kind="swin", size=size, window=window, mlp_ratio=hidden.shape[0] / dim,
        drop_path=0.0, mask_tokens="encoder/mask_token" in tensors,
        weight_init="normal", norm_epsilon=1e-5,
    ), image_size


def _size(shape: swin.Size, patch_size: int) -> str:
    for name, known in swin.SIZES.items():
        if known == shape:
            return f"{name}/{patch_size}"
    depths, heads = (".".join(map(str, part)) for part in (shape.depths, shape.heads))
    return f"W{shape.dim}-D{depths}-H{heads}/{patch_size}"


def _made(size: str, image_size: tuple[int, int], window: int) -> swin.Swin:
    try:
        return swin.Swin(size, image_size, window)
    except ValueError as error:
        raise ConversionError(f"image_size={image_size}: {error}") from error


def table_for(format: str, card: Card) -> spellings.Table | None:
    """Returns the names that a format has for a card's Swin; None for another encoder.
    """
    if not card.encoder.windows:
        return None
    depths = swin.parse_size(card.encoder.size)[0].depths
    if format == "timm":
        return spellings.timm_swin(depths)
    if card.kind == "classifier":
        return spellings.simmim_swin_classifier(depths)
    return spellings.simmim_swin(depths)


def check_format(card: Card, format: str) -> None:
    """Raises ConversionError if a format has no place for a Swin, or for this one."""
    encoder = card.encoder
    if format in ("mae", "huggingface"):
        raise ConversionError(
            f"The format {format} is for ViTs, and this is a {encoder.title}; take "
            "format 'simmim', 'timm' or 'safetensors'."
        )
    if format in ("timm", "simmim") and encoder.norm_epsilon != 1e-5:
        raise ConversionError(
            f"The format {format} is read by code whose norms have an epsilon of 1e-5, "
            f"this encoder's have {encoder.norm_epsilon:g}; take format 'safetensors'."
        )
    if card.kind == "classifier" and not classifier.ends_in_norm(card.model["pool"]):
        raise ConversionError(
            f"A Swin of the format {format} classifies the mean of normed tokens, this "
            f"model has pool={card.model['pool']!r}; take format 'safetensors', or the "
            "encoder with parts='encoder'."
        )


def projected(card: Card) -> int:
    """Returns the side in pixels of what is projected: a patch, of a Swin a cell."""
    if not card.encoder.windows:
        return card.patch_size
    return swin.parse_size(card.encoder.size)[1]


def timm_config(card: Card) -> dict[str, Any]:
    """Returns a config.json from which timm builds the model."""
    encoder, num_classes = card.encoder, card.model.get("num_classes", 0)
    shape, patch_size = swin.parse_size(encoder.size)
    known = next((n for n, s in swin.SIZES.items() if s == shape), "Ti")
    pretrained = dict(
        input_size=[card.channels, *card.image_size], interpolation="bicubic",
        crop_pct=0.875, num_classes=num_classes, pool_size=None,
        first_conv="patch_embed.proj", classifier="head.fc", fixed_input_size=True,
    )
    if card.mean is not None and card.std is not None:
        pretrained |= dict(mean=list(card.mean), std=list(card.std))
    return dict(
        architecture=f"swin_{_TIMM_SIZES[known]}_patch4_window7_224",
        num_classes=num_classes, num_features=encoder.dim, global_pool="avg",
        pretrained_cfg=pretrained,
        model_args=dict(
            img_size=list(card.image_size), patch_size=patch_size,
            in_chans=card.channels, embed_dim=shape.dim, depths=list(shape.depths),
            num_heads=list(shape.heads), window_size=encoder.window,
            mlp_ratio=encoder.mlp_ratio, global_pool="avg",
        ),
        **({"label_names": list(card.classes)} if card.classes else {}),
    )


def as_timm(state: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors of an encoder or classifier under timm's names."""
    format, _ = format_of(state)
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("encoder.")
        if name.endswith(BUFFERS) or name.startswith(("decoder.", "mask_token")):
            continue
        if format == "simmim":
            name = re.sub(
                r"layers\.(\d+)\.downsample",
                lambda match: f"layers.{int(match[1]) + 1}.downsample", name,
            )
            name = re.sub(r"^head\.", "head.fc.", name)
        renamed[name] = value
    return renamed
