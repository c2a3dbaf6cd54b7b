"""Parity of LocalMIM (arXiv 2303.05251): its targets, and its model of four scales."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.spellings import Row
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.targets.hog import HOG
from tests.parity_files import Data, nhwc
from tests.parity_models import nothing_left_out, prefixed
from tests.parity_report import Report

CELLS = (4, 8, 16, 32)  # fixed in the reference, finest first


def _decoder(k: int) -> spellings.Table:
    """Returns our names of scale `k` of the reference."""
    ours, theirs = f"decoder/scales_hog_{CELLS[k]}", f"decoder.{k}"
    rows = [
        Row(f"{ours}/mask_token", (f"{theirs}.mask_token",), "same"),
        Row(f"{ours}/decoder_pos_embed", (f"{theirs}.pos_embed",), "table"),
    ]
    linears = {"decoder_embed": "embed"} | {
        f"decoder_blocks_{{i}}/{layer}": f"blocks.{{i}}.{layer.replace('/', '.')}"
        for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    }
    norms = {"decoder_norm": "norm"} | {
        f"decoder_blocks_{{i}}/{norm}": f"blocks.{{i}}.{norm}"
        for norm in ("norm1", "norm2")
    }
    for kinds, weight, layout in (
        (linears, "kernel", "matrix"), (norms, "scale", "same")
    ):
        for name, other in kinds.items():
            rows.append(
                Row(f"{ours}/{name}/{weight}", (f"{theirs}.{other}.weight",), layout)
            )
            rows.append(Row(f"{ours}/{name}/bias", (f"{theirs}.{other}.bias",), "same"))
    parts = {
        0: {"up_0": 0, "norm": 1, "up_1": 3, "proj": 4}, 1: {"up_0": 0, "proj": 1},
        2: {"proj": 0}, 3: {"proj": 1},
    }[k]
    for name, number in parts.items():
        for kind in ("scale" if name == "norm" else "kernel", "bias"):
            last = "bias" if kind == "bias" else "weight"
            rows.append(Row(
                f"{ours}/decoder_pred/{name}/{kind}",
                (f"{theirs}.pred.{number}.{last}",), "same",
            ))
    return tuple(rows)


_TABLE = (
    *(Row(f"fusion/norms_{{i}}/{ours}", (f"norm.{{i}}.{theirs}",), "same")
      for ours, theirs in (("scale", "weight"), ("bias", "bias"))),
    *(row for k in range(len(CELLS)) for row in _decoder(k)),
    *(row for row in spellings.TIMM if not row.ours.startswith("encoder/norm")),
)


def _to_ours(state: Data) -> tuple[dict[str, Any], list[str]]:
    theirs = {}
    for name, value in state.items():
        if name.startswith("hog_enc."):  # fixed filters
            continue
        if re.search(r"\.pred\.\d\.weight$", name) and value.ndim == 4:
            if value.shape[2:] == (1, 1):
                value = value[:, :, 0, 0].T
            else:  # of transposed convolutions: in x out x 2 x 2
                value = value.transpose(0, 2, 3, 1).reshape(value.shape[0], -1)
        theirs[name] = tensor.of_array(value)
    return spellings.to_ours(_TABLE, theirs)


def _config(reference: dict[str, Any]) -> ConfigDict:
    ctor = reference["ctor"]
    if reference.get("layernorm_eps", 1e-6) != 1e-6:
        raise ValueError("Layer norm epsilon not 1e-6.")
    side, channels, ratio = ctor["img_size"], ctor["in_chans"], float(ctor["mlp_ratio"])
    model = common.local(
        f"W{ctor['embed_dim']}-D{ctor['depth']}-H{ctor['num_heads']}"
        f"/{ctor['patch_size']}"
    )
    model["dtype"] = "float32"
    model["encoder"]["mlp_ratio"] = ratio
    layers = [block % ctor["depth"] for block in model["fusion"]["maps"]]
    if reference.get("feature_layers", layers) != layers:
        raise ValueError(f"Blocks {reference['feature_layers']}, not {layers}.")
    model["decoder"].update(
        dim=ctor["decoder_embed_dim"], depth=ctor["decoder_depth"],
        num_heads=ctor["decoder_num_heads"], mlp_ratio=ratio,
    )
    mask_ratio = reference["forward"]["mask_ratio"]
    return ConfigDict(dict(
        model=model,
        masking=common.masking(mask_ratio=mask_ratio, pred_ratio=mask_ratio),
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        target=dict(
            kind="hog", bins=ctor["hog_nbins"], cells=CELLS, bias=ctor["hog_bias"]
        ),
        data=dict(
            image_size=(side, side), channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def check_model(_path: Path, data: Data, report: Report) -> None:
    """Targets, masks, predictions, the loss of each scale, and gradients."""
    reference = json.loads(str(data["config"]))
    if reference["ctor"]["hog_bias"]:
        raise ValueError("A bias of the filters is compared by the target alone.")
    objective = Pretrain(_config(reference))
    like = jax.eval_shape(objective.init, jax.random.key(0))
    ours, left_over = _to_ours(prefixed(data, "sd/"))
    variables = jax.tree.map(
        jnp.asarray, names.variables_of(ours, like, table=_TABLE, left_over=left_over)
    )
    images = jnp.asarray(nhwc(data["imgs"]))
    ids = masking.token_ids(jnp.asarray(data["noise"]), objective.counts)

    def forward(params):
        seen = _outputs(objective, {**variables, "params": params}, images, ids)
        return seen["loss"], seen

    (_, seen), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(
        variables["params"]
    )
    report.exact(
        "mask", masking.mask_of(ids.pred, num_patches=objective.num_patches),
        data["mask"],
    )
    kept = np.asarray(ids.keep)
    place = np.take_along_axis(data["ids_restore"], kept, axis=1)
    report.exact("ids_restore", place, np.arange(kept.shape[1])[None] + 0 * kept)
    report.loss("loss", seen.pop("loss"), data["loss"])
    for name, value in seen.items():
        report.output(name, value, data[name])
    expected, unknown = _to_ours(prefixed(data, "grad/"))
    gradients = traverse_util.flatten_dict(gradients, sep="/")
    if unknown or expected.keys() != gradients.keys():
        different = sorted(expected.keys() ^ gradients.keys())
        raise ValueError(f"Gradients of other tensors: {unknown}, {different}.")
    for name, theirs in expected.items():
        report.gradient(f"grad/{name}", gradients[name], theirs.read())
    nothing_left_out({*seen, "loss", "mask", "ids_restore"}, data, report)


def _outputs(objective: Pretrain, variables, images, ids) -> dict[str, Any]:
    """Returns activations under the fixture's names."""
    predicted, state = objective.model.apply(
        variables, images, ids, mutable=["intermediates"],
        capture_intermediates=lambda _, method: method == "__call__",
    )
    target = objective.target(variables, images)
    loss, aux = objective.prediction_loss(predicted, target, ids)
    contexts = state["intermediates"]["fusion"]["__call__"][0]
    outputs = {
        "loss": loss,
        "latent": jnp.stack([context.sequence for context in contexts]),
        "loss_per_scale": jnp.stack(
            [aux.metrics[f"loss_{name}"] for name in predicted]
        ),
    }
    for k, name in enumerate(predicted):
        outputs[f"pred/{k}"] = predicted[name].values
        outputs[f"target/{k}"] = target[name].values
        outputs[f"scale_mask/{k}"] = masking.coverage(
            ids.pred, grid=objective.grid, of=predicted[name].grid
        )
    return outputs


def check_target(_path: Path, data: Data, report: Report) -> None:
    """Histograms of each scale, with the biases that the fixture holds."""
    reference, images = json.loads(str(data["config"])), jnp.asarray(nhwc(data["imgs"]))
    target = HOG(
        images.shape[1:3], images.shape[3], patch_size=16, bins=reference["nbins"],
        cells=tuple(reference["pools"]), bias=reference["bias"],
    )
    variables, compared = {}, {"config", "imgs"}
    if reference["bias"]:
        biases = [data[f"hog_bias/{k}"] for k in range(len(reference["pools"]))]
        variables = {"hog": {"hog": {"bias": jnp.asarray(np.stack(biases))}}}
        compared |= {f"hog_bias/{k}" for k in range(len(biases))}
    found = jax.jit(target)(variables, images)
    for k, name in enumerate(target.widths):
        tokens = found[name]
        report.output(f"hog_tokens/{k}", tokens.values, data[f"hog_tokens/{k}"])
        maps = tokens.laid_out().reshape(
            len(images), *tokens.grid, images.shape[3], reference["nbins"]
        )
        report.output(
            f"hog_maps/{k}", maps.transpose(0, 3, 4, 1, 2), data[f"hog_maps/{k}"]
        )
        compared |= {f"hog_tokens/{k}", f"hog_maps/{k}"}
    # Gradients and bins of single pixels are inside of the histograms.
    compared |= {"grad_maps_channel0_scale0", "bin_channel0_scale0"}
    if left := data.keys() - compared:
        raise ValueError(f"Not compared: {', '.join(sorted(left))}.")
