"""What other models keep apart and ours have in one tensor, computed into it.

    batch norm      of a linear probe, without parameters, into the head:
                    W (x - mean) / deviation + b
    layer scale     of DeiT III (arXiv 2204.07118), into the layers before it:
                    gamma * (W x + b)
    class token     of TEC (arXiv 2210.11016), that an MLP makes of a parameter: what
                    it makes
    class row       that a position table lacks whose class token has no position: zeros

The model computes the same; trained on, the parts would have moved apart.
"""

import math
from typing import Any

import numpy as np

from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.models.classifier import BatchNorm

# Where a layer scale follows, by what `spellings.FOLDED` calls it.
_SCALED = {"ls1": "attn/proj", "ls2": "mlp/fc2"}


def batch_norm(tensors: Tensors) -> dict[str, Tensor]:
    """Returns tensors of a linear probe whose head does what its norm did before it."""
    folded = dict(tensors)
    mean, var = folded.pop("batch_norm/mean"), folded.pop("batch_norm/var")
    kernel, bias = folded["head/kernel"], folded["head/bias"]

    def scaled():
        deviation = np.sqrt(var.read().astype(np.float64) + BatchNorm.epsilon)
        return kernel.read() / deviation[:, None]

    folded["head/kernel"] = Tensor(
        kernel.shape, kernel.dtype, lambda: scaled().astype(kernel.dtype)
    )
    folded["head/bias"] = Tensor(
        bias.shape, bias.dtype,
        lambda: (bias.read() - mean.read() @ scaled()).astype(bias.dtype),
    )
    return folded


def has_cls_token_mlp(tensors: Tensors) -> bool:
    """Says whether an encoder's class token passes an MLP."""
    return "encoder/cls_token_mlp/fc1/kernel" in tensors


def cls_token_mlp(tensors: Tensors) -> dict[str, Tensor]:
    """Returns tensors whose class token is what its MLP made of it."""
    folded, layers = dict(tensors), []
    for layer in ("fc1", "fc2"):
        name = f"encoder/cls_token_mlp/{layer}"
        layers.append((folded.pop(f"{name}/kernel"), folded.pop(f"{name}/bias")))
    token = folded["encoder/cls_token"]

    def passed():
        (fc1, bias1), (fc2, bias2) = (
            [x.read().astype(np.float64) for x in layer] for layer in layers
        )
        hidden = token.read().astype(np.float64) @ fc1 + bias1
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return (hidden @ fc2 + bias2).astype(token.dtype)

    folded["encoder/cls_token"] = Tensor(token.shape, token.dtype, passed)
    return folded


def on_reading(
    tensors: dict[str, Tensor], *, patch_size: int, image_size: Any, wanted: Any,
    evidence: list[str],
) -> dict[str, Tensor]:
    """Returns tensors under our names with all of this folded, as far as there is any.

    Args:
      image_size: that the weights were trained at, if it is known.
      wanted: that they will be used at. It tells of a missing class row only where
        there is no square of patches beside one.
      evidence: gets a line for each kind.
    """
    if {"batch_norm/mean", "batch_norm/var", "head/kernel", "head/bias"} <= (
        tensors.keys()
    ):
        tensors = batch_norm(tensors)
        evidence.append("folded: the head's batch norm, into the head")
    tensors, number = _layer_scale(tensors)
    if number:
        evidence.append(
            f"folded: the layer scale at {number} places, into the layers before it"
        )
    table = tensors.get("encoder/pos_embed")
    if table is not None and len(table.shape) == 2 and _lacks_class_row(
        table.shape[0], patch_size, image_size, wanted
    ):
        tensors = tensors | {"encoder/pos_embed": table.then(
            lambda x: np.concatenate([np.zeros_like(x[:1]), x])
        )}
        evidence.append(
            f"positions: {table.shape[0]} rows, none of them for the class token, as "
            "in DeiT III; zeros were put before them"
        )
    return tensors


def _layer_scale(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    folded, number = dict(tensors), 0
    for name, gamma in tensors.items():
        block, _, last = name.rpartition("/")
        layer = f"{block}/{_SCALED.get(last)}"
        kernel, bias = tensors.get(f"{layer}/kernel"), tensors.get(f"{layer}/bias")
        if kernel is None or bias is None or gamma.shape != bias.shape:
            continue
        del folded[name]
        for part in (kernel, bias):
            folded[f"{layer}/{'kernel' if part is kernel else 'bias'}"] = Tensor(
                part.shape, part.dtype,
                lambda part=part, gamma=gamma: part.read() * gamma.read(),
            )
        number += 1
    return folded, number


def _lacks_class_row(
    rows: int, patch_size: int, image_size: Any, wanted: Any
) -> bool:
    if image_size is None and math.isqrt(rows - 1) ** 2 != rows - 1:
        image_size = wanted
    return image_size is not None and rows == math.prod(
        length // patch_size for length in image_size
    )
