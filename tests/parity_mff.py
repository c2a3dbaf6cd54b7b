"""Parity of multi-level feature fusion with mmpretrain's MFF (arXiv 2308.00261)."""

import json
import re
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.models import posemb
from crossmae_jax.objectives.pretrain import Pretrain
from tests.parity_files import Data, nhwc
from tests.parity_models import nothing_left_out, prefixed
from tests.parity_report import Report

# mmpretrain's names -> those of MAE; what is MFF's own keeps its name.
_RENAMED = (
    (r"^(backbone|neck)\.", ""), (r"patch_embed\.projection", "patch_embed.proj"),
    (r"^layers\.", "blocks."), (r"\.ln([12])\.", r".norm\1."),
    (r"ffn\.layers\.0\.0\.", "mlp.fc1."), (r"ffn\.layers\.1\.", "mlp.fc2."),
)
_TABLE = (
    *spellings.MAE,
    spellings.Row("fusion/weights", ("proj_weights",), "same"),
    spellings.Row("fusion/proj_{i}/kernel", ("proj_layers.{i}.weight",), "matrix"),
    spellings.Row("fusion/proj_{i}/bias", ("proj_layers.{i}.bias",), "same"),
    spellings.Row("fusion/norm/scale", ("fused.weight",), "same"),
    spellings.Row("fusion/norm/bias", ("fused.bias",), "same"),
)


def _mae_name(name: str) -> str:
    name = re.sub(r"^backbone\.ln1\.", "fused.", name)
    name = re.sub(r"^neck\.ln1\.", "decoder_norm.", name)
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _to_ours(state: Data) -> tuple[dict[str, Any], Any]:
    theirs = {_mae_name(name): tensor.of_array(v) for name, v in state.items()}
    return spellings.to_ours(_TABLE, theirs)


def _config(reference: dict[str, Any]) -> ConfigDict:
    arch, decoder = reference["arch"], reference["decoder"]
    if reference["layernorm_eps"] != 1e-6:
        raise ValueError(f"Layer norm epsilon {reference['layernorm_eps']}, not 1e-6.")
    side, channels = reference["img_size"], reference.get("in_channels", 3)
    size = f"W{arch['embed_dims']}-D{arch['num_layers']}-H{arch['num_heads']}"
    return ConfigDict(dict(
        model=dict(
            encoder=dict(
                kind="vit", size=f"{size}/{reference['patch_size']}",
                mlp_ratio=arch["feedforward_channels"] / arch["embed_dims"],
            ),
            fusion=dict(kind="multi_level", maps=tuple(reference["out_indices"])),
            decoder=dict(
                kind="mae", dim=decoder["decoder_embed_dim"],
                depth=decoder["decoder_depth"], num_heads=decoder["decoder_num_heads"],
                mlp_ratio=decoder["mlp_ratio"],
            ),
            aggregator=dict(kind="none"), remat="selective", dtype="float32",
        ),
        masking=common.masking(
            mask_ratio=reference["mask_ratio"], pred_ratio=reference["mask_ratio"]
        ),
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        target=dict(kind="pixels", normalize=reference["norm_pix"]),
        data=dict(
            image_size=(side, side), channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def check_fusion(_path: Path, data: Data, report: Report) -> None:
    """Activations, loss and gradients of one forward and backward pass."""
    config = _config(json.loads(str(data["config"])))
    objective = Pretrain(config)
    like = jax.eval_shape(objective.init, jax.random.key(0))
    ours, left_over = _to_ours(prefixed(data, "sd/"))
    variables = jax.tree.map(
        jnp.asarray, names.variables_of(ours, like, table=_TABLE, left_over=left_over)
    )
    images = jnp.asarray(nhwc(data["imgs"]))
    ids = masking.token_ids(jnp.asarray(data["noise"]), objective.counts)

    def outputs(variables):
        model, seen = objective.model, {}
        predicted, state = model.apply(
            variables, images, ids, mutable=["intermediates"],
            capture_intermediates=lambda module, method: method == "__call__",
        )
        encoder = state["intermediates"]["encoder"]["__call__"][0]
        fusion = state["intermediates"]["fusion"]
        (context,) = fusion["__call__"][0]
        weights = variables["params"]["fusion"]["weights"]
        shares = jax.nn.softmax(weights, axis=0)
        num_shallow = len(weights) - 1
        parts = [fusion[f"proj_{i}"]["__call__"][0] for i in range(num_shallow)]
        parts.append(encoder.maps[model.fusion.used_maps[-1]].sequence)
        seen["fused_before_norm"] = jnp.sum(shares * jnp.stack(parts), axis=0)
        seen["latent"] = context.sequence
        seen["layer_out"] = jnp.stack([each.sequence for each in encoder.maps[1:]])
        seen["fusion_weights"] = shares[:, 0, 0, 0]
        seen["pred"] = predicted["pixels"].at(None)
        seen["loss"] = objective.masked_loss(variables, images, ids)[0]
        return seen

    seen = jax.jit(outputs)(variables)
    masked = np.asarray(masking.mask_of(ids.pred, num_patches=objective.num_patches))
    report.exact("mask", masked, data["mask"])
    kept = np.asarray(ids.keep)
    place = np.take_along_axis(data["ids_restore"], kept, axis=1)
    report.exact("ids_restore", place, np.arange(kept.shape[1])[None] + 0 * kept)
    # The reference predicts visible patches, too, which no loss looks at.
    seen["pred"] = np.where(masked[:, :, None], seen["pred"], data["pred"])
    report.loss("loss", seen.pop("loss"), data["loss"])
    for name, value in seen.items():
        report.output(name, value, data[name])
    _compare_gradients(objective, variables, images, ids, data, report)
    nothing_left_out({*seen, "loss", "mask", "ids_restore"}, data, report)


def _compare_gradients(objective, variables, images, ids, data, report) -> None:
    def loss(params):
        return objective.masked_loss({**variables, "params": params}, images, ids)[0]

    gradients = traverse_util.flatten_dict(
        jax.jit(jax.grad(loss))(variables["params"]), sep="/"
    )
    expected, left_over = _to_ours(prefixed(data, "grad/"))
    if left_over or expected.keys() != gradients.keys():
        different = sorted(expected.keys() ^ gradients.keys())
        raise ValueError(f"Gradients of other tensors: {left_over}, {different}.")
    for name, theirs in expected.items():
        report.gradient(f"grad/{name}", gradients[name], theirs.read())


def check_posembed(_path: Path, data: Data, report: Report) -> None:
    """Their position table is ours of the transposed grid."""
    reference = json.loads(str(data["config"]))
    side = reference["grid"]
    ours = posemb.sincos((side, side), reference["dim"])
    patches = einops.rearrange(ours[1:], "(row col) d -> (col row) d", row=side)
    report.output("table", np.concatenate([ours[:1], patches]), data["table"])
