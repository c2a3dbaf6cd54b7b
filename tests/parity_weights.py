"""Parity of weights in files: checkpoints of the references, of timm, fine-tuned ones.

They are opened as a user opens them, by what they hold; only what they do not hold, the
number of heads of models this small, is taken from the file of expected numbers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from crossmae_jax import masking
from crossmae_jax.convert import names, opening, structure
from crossmae_jax.models import posemb
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.runs import workdir
from tests.parity_files import Data, load_npz, nhwc, token_counts
from tests.parity_models import (
    compare_outputs,
    make_config,
    model_outputs,
    nothing_left_out,
)
from tests.parity_report import Report


def expected_of(path: Path) -> tuple[Data, dict[str, Any]] | None:
    """Returns the expected numbers beside a file of weights, and their `config`."""
    for other in sorted(path.parent.glob("*_expected.npz")):
        data = load_npz(other)
        reference = json.loads(str(data["config"]))
        if path.name in _files(reference):
            return data, reference
    return None


def _files(reference: dict[str, Any]) -> list[str]:
    found = reference.get("checkpoint", reference.get("weights", ()))
    return [found] if isinstance(found, str) else list(found)


def weights_of(path: Path, reference: dict[str, Any]) -> Iterator[Path]:
    """Names the files of weights that a file is about: itself, or those it names."""
    if path.suffix != ".npz":
        yield path
    else:
        yield from (path.with_name(name) for name in _files(reference))


def check(path: Path, data: Data, report: Report) -> None:
    """Compares what a model makes of images with what the file expects.

    `path` is the file of weights, or the file of expected numbers that names it.
    """
    reference = json.loads(str(data["config"]))
    if "class" in reference and reference["class"].startswith("models_vit."):
        compare = _classifier
    elif "weights" in reference:
        compare = _classifier
    elif "ctor_of_source" in reference:
        compare = _encoder
    else:
        compare = _pretraining
    for file in weights_of(path, reference):
        compare(file, reference, data, report)


def _images(data: Data, name: str = "imgs") -> jax.Array:
    return jnp.asarray(nhwc(data[name]))


def _read(weights: opening.Weights) -> Any:
    like = structure.abstract_variables(weights.card)
    return jax.tree.map(jnp.asarray, names.variables_of(weights.tensors, like))


def _pretraining(
    path: Path, reference: dict[str, Any], data: Data, report: Report
) -> None:
    ctor, config = reference["ctor"], make_config(reference)
    weights = opening.open_weights(
        path, num_heads=ctor["num_heads"], decoder_heads=ctor["decoder_num_heads"]
    )
    card = weights.card
    known = workdir.flatten(config.model.to_dict())
    for name, value in workdir.flatten(card.model).items():
        if name in known and name != "fusion.input":
            report.exact(f"model.{name}", str(value), str(known[name]))
    report.exact("image size", card.image_size, config.data.image_size)
    report.exact("standardised targets", card.normalize, config.target.normalize)
    objective, variables = Pretrain(structure.config_of(card)), _read(weights)
    objective.counts = token_counts(
        objective.num_patches, config.masking.mask_ratio, config.asked_pred_ratio
    )
    images = _images(data)
    ids = masking.token_ids(jnp.asarray(data["noise"]), objective.counts)
    outputs = dict(model_outputs(objective, variables, images, ids))
    encoder = {kind: tree["encoder"] for kind, tree in variables.items()}
    for pooling in ("gap", "cls"):
        if f"finetune_tokens_{pooling}" in data:
            tokens, pooled = _finetuned(
                objective.model.encoder, encoder, images, pooling
            )
            outputs[f"finetune_tokens_{pooling}"] = tokens
            outputs[f"finetune_pre_logits_{pooling}"] = pooled
    compare_outputs(outputs, data, report)
    nothing_left_out(outputs.keys(), data, report)


def _finetuned(
    encoder: nn.Module, variables: Any, images: jax.Array, pooling: str
) -> tuple[jax.Array, jax.Array]:
    """The encoder as a plain ViT: all tokens, pooled as fine-tuning pools them."""
    encoder = encoder.clone(
        final_norm=pooling == "cls", image_size=images.shape[1:3]
    )
    params = variables["params"]
    if pooling == "gap":
        params = {name: value for name, value in params.items() if name != "norm"}
    tokens = encoder.apply({**variables, "params": params}, images).last.sequence
    if pooling == "cls":
        return tokens, tokens[:, 0]
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    return tokens, norm.apply({}, tokens[:, 1:].mean(1))


def _encoder(path: Path, reference: dict[str, Any], data: Data, report: Report) -> None:
    """An encoder by itself, at its own image size and at a larger one."""
    weights = opening.open_weights(
        path, num_heads=reference["ctor_of_source"]["num_heads"]
    )
    variables = {kind: tree["encoder"] for kind, tree in _read(weights).items()}
    encoder, table = structure.build(weights.card), variables["constants"]["pos_embed"]
    compared = set()
    for size in ("same", "interp"):
        images = _images(data, f"imgs/{size}")
        grids = [
            tuple(side // weights.card.patch_size for side in sides)
            for sides in (weights.card.image_size, images.shape[1:3])
        ]
        resized = posemb.resize(np.asarray(table), grid=grids[0], new_grid=grids[1])
        own = {**variables, "constants": {"pos_embed": jnp.asarray(resized)}}
        found = {f"pos_embed/{size}": resized[None]}
        for pooling in ("gap", "cls"):
            tokens, pooled = _finetuned(encoder, own, images, pooling)
            found[f"tokens/{pooling}_{size}"] = tokens
            found[f"pre_logits/{pooling}_{size}"] = pooled
        for name, ours in found.items():
            report.output(f"{path.name} {name}", ours, data[name])
        compared |= {*found, f"imgs/{size}"}
    _all_compared(compared, data, report)


def _classifier(
    path: Path, reference: dict[str, Any], data: Data, report: Report
) -> None:
    """A fine-tuned classifier, or one of timm."""
    heads = {**reference.get("resolved", {}), **reference.get("ctor", {})}["num_heads"]
    weights = opening.open_weights(path, num_heads=heads)
    found = structure.build(weights.card).apply(_read(weights), _images(data))
    tokens = "tokens" if "tokens" in data else "features"
    report.output(tokens, found.tokens.sequence, data[tokens])
    report.output("pre_logits", found.features, data["pre_logits"])
    report.output("logits", found.logits, data["logits"])
    _all_compared({"imgs", tokens, "pre_logits", "logits"}, data, report)


def _all_compared(compared: set[str], data: Data, report: Report) -> None:
    left = sorted(data.keys() - compared - {"config"})
    if left:
        report.failed = True
        report.lines.append(f"FAIL not compared: {', '.join(left)}")
