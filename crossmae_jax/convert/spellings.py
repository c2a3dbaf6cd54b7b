"""What each format calls our tensors, and how it lays them out.

A format is a table of rows (our name, their names, layout), read in both directions.
`{i}` stands for the number of a block. Our names are paths in the model's variables
without the collection: "encoder/blocks_3/attn/qkv/kernel". Layouts:

    same      unchanged
    matrix    theirs out x in, ours in x out
    conv      theirs out x c x p x p, ours (p p c) x out, as our patch vectors
    table     theirs 1 x (1 + n) x d, ours (1 + n) x d
    shuffled  theirs (3 p p) x in x 1 x 1, colours slowest as a pixel shuffle has them,
              ours in x (p p 3), as our patch vectors; likewise of a bias, (3 p p)

A row with several of their names joins these along their first axis, such as the
queries, keys and values that Hugging Face keeps apart, before the layout is changed.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import einops
import numpy as np

from crossmae_jax.convert.files.tensor import Tensor, Tensors


class Row(NamedTuple):
    """One tensor of ours, what it is called elsewhere, and the change of layout."""

    ours: str
    theirs: tuple[str, ...]
    layout: str


Table = tuple[Row, ...]


def _row(ours: str, theirs: str, layout: str = "same") -> Row:
    return Row(ours, (theirs,), layout)


def _linear(ours: str, *theirs: str) -> Table:
    return (
        Row(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), "matrix"),
        Row(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), "same"),
    )


def _norm(ours: str, theirs: str) -> Table:
    return (
        _row(f"{ours}/scale", f"{theirs}.weight"),
        _row(f"{ours}/bias", f"{theirs}.bias"),
    )


def _reference_block(ours: str, theirs: str) -> Table:
    rows: list[Row] = []
    for norm in ("norm0", "norm1", "norm2"):
        rows += _norm(f"{ours}/{norm}", f"{theirs}.{norm}")
    for linear in (
        "attn/qkv", "attn/proj", "self_attn/qkv", "self_attn/proj",
        "cross_attn/q", "cross_attn/kv", "cross_attn/proj", "mlp/fc1", "mlp/fc2",
    ):
        rows += _linear(f"{ours}/{linear}", f"{theirs}.{linear.replace('/', '.')}")
    return tuple(rows)


def _huggingface_block(ours: str, theirs: str) -> Table:
    parts = (f"{theirs}.attention.attention.{x}" for x in ("query", "key", "value"))
    return (
        *_norm(f"{ours}/norm1", f"{theirs}.layernorm_before"),
        *_linear(f"{ours}/attn/qkv", *parts),
        *_linear(f"{ours}/attn/proj", f"{theirs}.attention.output.dense"),
        *_norm(f"{ours}/norm2", f"{theirs}.layernorm_after"),
        *_linear(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense"),
        *_linear(f"{ours}/mlp/fc2", f"{theirs}.output.dense"),
    )


def _decoder(prefix: str) -> Table:
    """The names around a decoder's blocks, which MAE and Hugging Face share."""
    return (
        _row("decoder/mask_token", f"{prefix}mask_token"),
        _row("decoder/decoder_pos_embed", f"{prefix}decoder_pos_embed", "table"),
        *_linear("decoder/decoder_embed", f"{prefix}decoder_embed"),
        *_norm("decoder/decoder_norm", f"{prefix}decoder_norm"),
        *_linear("decoder/decoder_pred", f"{prefix}decoder_pred"),
    )


# timm's VisionTransformer. MAE's fine-tuning scripts use the same names.
TIMM: Table = (
    _row("encoder/cls_token", "cls_token"),
    _row("encoder/pos_embed", "pos_embed", "table"),
    _row("encoder/patch_embed/proj/kernel", "patch_embed.proj.weight", "conv"),
    _row("encoder/patch_embed/proj/bias", "patch_embed.proj.bias"),
    *_reference_block("encoder/blocks_{i}", "blocks.{i}"),
    *_norm("encoder/norm", "norm"),
    *_norm("fc_norm", "fc_norm"),
    *_linear("head", "head"),
)

# What is read, and folded into others before it is ours: see `folding`. Linear probes
# of MAE's script; layer scale as timm and as DeiT's authors call it.
FOLDED: Table = (
    _row("batch_norm/mean", "head.0.running_mean"),
    _row("batch_norm/var", "head.0.running_var"),
    *_linear("head", "head.1"),
    *(
        _row(f"encoder/blocks_{{i}}/ls{n}", f"blocks.{{i}}.{theirs}")
        for n in (1, 2) for theirs in (f"ls{n}.gamma", f"gamma_{n}")
    ),
)

# facebookresearch/mae and TonyLianLong/CrossMAE share one layout.
MAE: Table = (
    *TIMM,
    _row("fusion/kernel", "wfm.linear.weight", "matrix"),
    *_norm("fusion/dec_norms_{i}", "dec_norms.{i}"),
    *_decoder(""),
    *_reference_block("decoder/decoder_blocks_{i}", "decoder_blocks.{i}"),
)


def _simmim(prefix: str) -> Table:
    """SimMIM's ViT, which is BEiT's, with what stands before its names."""
    blocks, table = f"{prefix}blocks.{{i}}", "relative_position_bias_table"
    biases = tuple(f"{blocks}.attn.{x}_bias" for x in "qv")
    return (
        _row("encoder/cls_token", f"{prefix}cls_token"),
        _row("encoder/mask_token", f"{prefix}mask_token"),
        _row("encoder/pos_embed", f"{prefix}pos_embed", "table"),
        _row("encoder/patch_embed/proj/kernel", f"{prefix}patch_embed.proj.weight",
             "conv"),
        _row("encoder/patch_embed/proj/bias", f"{prefix}patch_embed.proj.bias"),
        _row("encoder/relative_bias/table", f"{prefix}rel_pos_bias.{table}"),
        _row("encoder/relative_bias_{i}/table", f"{blocks}.attn.{table}"),
        _row("encoder/blocks_{i}/attn/qkv/kernel", f"{blocks}.attn.qkv.weight",
             "matrix"),
        Row("encoder/blocks_{i}/attn/qkv/bias", biases, "same"),
        *_linear("encoder/blocks_{i}/attn/proj", f"{blocks}.attn.proj"),
        *_linear("encoder/blocks_{i}/mlp/fc1", f"{blocks}.mlp.fc1"),
        *_linear("encoder/blocks_{i}/mlp/fc2", f"{blocks}.mlp.fc2"),
        *_norm("encoder/blocks_{i}/norm1", f"{blocks}.norm1"),
        *_norm("encoder/blocks_{i}/norm2", f"{blocks}.norm2"),
        _row("encoder/blocks_{i}/gamma_1", f"{blocks}.gamma_1"),
        _row("encoder/blocks_{i}/gamma_2", f"{blocks}.gamma_2"),
        *_norm("encoder/norm", f"{prefix}norm"),
    )


# microsoft/SimMIM, of a pre-training and of a fine-tuning.
SIMMIM: Table = (
    *_simmim("encoder."),
    _row("decoder/decoder_pred/kernel", "decoder.0.weight", "shuffled"),
    _row("decoder/decoder_pred/bias", "decoder.0.bias", "shuffled"),
)
SIMMIM_CLASSIFIER: Table = (
    *_simmim(""), *_norm("fc_norm", "fc_norm"), *_linear("head", "head")
)


def _swin(prefix: str, depths: tuple[int, ...], *, merging: int) -> Table:
    """Swin, whose blocks are numbered by stage, and by block in it.

    Args:
      prefix: what stands before its names.
      depths: blocks of each stage.
      merging: 0 if merging belongs to the stage before it, 1 to the one behind it.
    """
    rows: list[Row] = [
        _row("encoder/mask_token", f"{prefix}mask_token"),
        _row("encoder/patch_embed/proj/kernel", f"{prefix}patch_embed.proj.weight",
             "conv"),
        _row("encoder/patch_embed/proj/bias", f"{prefix}patch_embed.proj.bias"),
        *_norm("encoder/patch_embed/norm", f"{prefix}patch_embed.norm"),
        *_norm("encoder/norm", f"{prefix}norm"),
    ]
    number, table = 0, "attn{}relative_position_bias_table"
    for stage, depth in enumerate(depths):
        for i in range(depth):
            ours = f"encoder/blocks_{number + i}"
            theirs = f"{prefix}layers.{stage}.blocks.{i}"
            rows.append(_row(
                f"{ours}/{table.format('/')}", f"{theirs}.{table.format('.')}"
            ))
            rows += _reference_block(ours, theirs)
        number += depth
        if stage + 1 == len(depths):
            break
        ours = f"encoder/downsample_{number - 1}"
        theirs = f"{prefix}layers.{stage + merging}.downsample"
        rows.append(_row(
            f"{ours}/reduction/kernel", f"{theirs}.reduction.weight", "matrix"
        ))
        rows += _norm(f"{ours}/norm", f"{theirs}.norm")
    return tuple(rows)


def simmim_swin(depths: tuple[int, ...]) -> Table:
    """Returns the names of microsoft/SimMIM's Swin, of a pre-training."""
    return _swin("encoder.", depths, merging=0) + SIMMIM[-2:]


def simmim_swin_classifier(depths: tuple[int, ...]) -> Table:
    """Returns the names of its fine-tuned Swin, which are those of microsoft's Swin."""
    return (*_swin("", depths, merging=0), *_linear("head", "head"))


def timm_swin(depths: tuple[int, ...]) -> Table:
    """Returns the names of timm's SwinTransformer, which has no mask token."""
    return (*_swin("", depths, merging=1)[1:], *_linear("head", "head.fc"))


def _huggingface(prefix: str) -> Table:
    patches = f"{prefix}embeddings.patch_embeddings.projection"
    return (
        _row("encoder/cls_token", f"{prefix}embeddings.cls_token"),
        _row("encoder/pos_embed", f"{prefix}embeddings.position_embeddings", "table"),
        _row("encoder/patch_embed/proj/kernel", f"{patches}.weight", "conv"),
        _row("encoder/patch_embed/proj/bias", f"{patches}.bias"),
        *_huggingface_block("encoder/blocks_{i}", f"{prefix}encoder.layer.{{i}}"),
        *_norm("encoder/norm", f"{prefix}layernorm"),
    )


# As files of transformers spell them: ViTMAEForPreTraining, ViTModel by itself,
# and ViTForImageClassification.
HUGGINGFACE_MAE: Table = (
    *_huggingface("vit."),
    *_decoder("decoder."),
    *_huggingface_block("decoder/decoder_blocks_{i}", "decoder.decoder_layers.{i}"),
)
HUGGINGFACE_VIT: Table = _huggingface("")
HUGGINGFACE_CLASSIFIER: Table = (*_huggingface("vit."), *_linear("head", "classifier"))

def _unshuffled(x: np.ndarray) -> np.ndarray:
    patch_size = math.isqrt(x.shape[0] // 3)
    x = einops.rearrange(x, "(c p q) ... -> (p q c) ...", c=3, p=patch_size)
    return x if x.ndim == 1 else x[:, :, 0, 0].T


def _shuffled(x: np.ndarray, _: int) -> np.ndarray:
    patch_size = math.isqrt(len(x if x.ndim == 1 else x.T) // 3)
    x = x if x.ndim == 1 else x.T[:, :, None, None]
    return einops.rearrange(x, "(p q c) ... -> (c p q) ...", c=3, p=patch_size)


# Layout: to ours, and to theirs with the size of a patch that is projected.
_LAYOUTS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "same": (lambda x: x, lambda x, p: x),
    "matrix": (lambda x: x.T, lambda x, p: x.T),
    "table": (lambda x: x[0], lambda x, p: x[None]),
    "shuffled": (_unshuffled, _shuffled),
    "conv": (
        lambda x: einops.rearrange(x, "out c p q -> (p q c) out"),
        lambda x, p: einops.rearrange(x, "(p q c) out -> out c p q", p=p, q=p),
    ),
}
_RANKS = {"matrix": 2, "table": 3, "conv": 4}


def _match(template: str, name: str) -> str | None:
    """Returns the number that `{i}` stands for, "" if the template has none."""
    head, braces, tail = template.partition("{i}")
    if not braces:
        return "" if name == template else None
    number = name[len(head) : len(name) - len(tail)]
    if name == f"{head}{number}{tail}" and re.fullmatch(r"0|[1-9]\d*", number):
        return number
    return None


def their_names(table: Table, name: str) -> tuple[str, ...]:
    """Returns what a format calls one of our tensors; nothing if it has no such one."""
    for row in table:
        number = _match(row.ours, name)
        if number is not None:
            return tuple(theirs.replace("{i}", number) for theirs in row.theirs)
    return ()


def to_ours(table: Table, theirs: Tensors) -> tuple[dict[str, Tensor], list[str]]:
    """Returns their tensors under our names and in our layouts, and what is left over.

    Left over are tensors that the format does not have, those of another rank than it
    gives them, and parts of one of ours of which another part is missing.
    """
    parts: dict[tuple[Row, str], dict[str, Tensor]] = {}
    left_over = []
    for name, value in theirs.items():
        for row in table:
            numbers = (_match(template, name) for template in row.theirs)
            number = next((n for n in numbers if n is not None), None)
            if number is not None:
                parts.setdefault((row, number), {})[name] = value
                break
        else:
            left_over.append(name)
    ours = {}
    for (row, number), tensors in parts.items():
        expected = [template.replace("{i}", number) for template in row.theirs]
        rank = _RANKS.get(row.layout)
        if len(tensors) < len(expected) or rank and any(
            len(part.shape) != rank for part in tensors.values()
        ):
            left_over += tensors
            continue
        joined = _joined([tensors[name] for name in expected])
        ours[row.ours.replace("{i}", number)] = joined.then(_LAYOUTS[row.layout][0])
    return ours, left_over


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    length = sum(part.shape[0] for part in parts)
    return Tensor(
        (length, *parts[0].shape[1:]), parts[0].dtype,
        lambda: np.concatenate([part.read() for part in parts]),
    )


def to_theirs(
    table: Table, ours: Tensors, *, patch_size: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns our tensors under their names and layouts, and the names left over."""
    theirs, left_over = {}, []
    for name, value in ours.items():
        for row in table:
            number = _match(row.ours, name)
            if number is None:
                continue
            back = _LAYOUTS[row.layout][1]
            whole = value.then(lambda x, back=back: back(x, patch_size))
            names = [template.replace("{i}", number) for template in row.theirs]
            for i, part_name in enumerate(names):
                theirs[part_name] = whole if len(names) == 1 else whole.then(
                    lambda x, i=i, num=len(names): np.split(x, num)[i]
                )
            break
        else:
            left_over.append(name)
    return theirs, left_over
