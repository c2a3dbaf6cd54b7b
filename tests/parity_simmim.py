"""Parity of SimMIM's ViT (arXiv 2111.09886), by itself and with PR-MIM."""

import json
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Tokens
from tests.parity_files import Data, nhwc
from tests.parity_models import prefixed
from tests.parity_report import Report

_BUFFER = "relative_position_index"
_AGGREGATOR = (
    spellings.Row("aggregator/mixer/kernel", ("agg.weight",), "same"),
    spellings.Row("aggregator/mixer/bias", ("agg.bias",), "same"),
)


def _config(reference: dict[str, Any], state: Data, *, norm: bool) -> ConfigDict:
    """Translates a fixture's settings; those of PR-MIM lie flat."""
    ctor = reference.get("ctor", reference)
    if (epsilon := reference.get("layernorm_eps", reference.get("norm_eps"))) != 1e-6:
        raise ValueError(f"Layer norm epsilon {epsilon}, not 1e-6.")
    if ctor.get("drop_path_rate") or ctor.get("use_mean_pooling"):
        raise ValueError("Stochastic depth and mean pooling are not part of this.")
    side, patch_size = ctor["img_size"], ctor["patch_size"]
    num_patches = (side // patch_size) ** 2
    model = common.simmim(
        f"W{ctor['embed_dim']}-D{ctor['depth']}-H{ctor['num_heads']}/{patch_size}"
    )
    biased = {"encoder.blocks.0.attn.q_bias", "encoder.blocks.0.attn.v_bias"}
    model["encoder"].update(
        mlp_ratio=float(ctor["mlp_ratio"]), drop_path=0.0,
        positions="learned" if ctor["use_abs_pos_emb"] else "none",
        relative_bias="shared" if ctor["use_shared_rel_pos_bias"] else (
            "per_block" if ctor.get("use_rel_pos_bias") else "none"
        ),
        qkv_bias="qv" if biased <= state.keys() else "none",
        layer_scale=ctor["init_values"],
    )
    model["decoder"].update(norm=norm)
    model["dtype"] = "float32"
    thrown = reference.get("n_thrown_patches", 0)
    if "kernel" in reference:
        model["aggregator"].update(kind="conv", kernel_size=reference["kernel"])
    channels = ctor.get("in_chans", 3)
    return ConfigDict(dict(
        model=model,
        masking=common.masking(
            mask_ratio=reference["mask_ratio"], pred_ratio=reference["mask_ratio"],
            throw_ratio=thrown / num_patches,
        ) | dict(
            unit=reference["unit"] if "unit" in reference
            else reference["mask_patch_size"] // patch_size
        ),
        loss=dict(kind="l1", thrown_weight=1.0, weights={}),
        target=dict(kind="pixels", normalize=False),
        data=dict(
            image_size=(side, side), channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def _table(norm: bool) -> spellings.Table:
    """Returns the names of SimMIM's files, and where the final norm is."""
    rows = (
        row._replace(ours=row.ours.replace("encoder/norm/", "decoder/decoder_norm/"))
        if norm else row for row in spellings.SIMMIM
    )
    return (*rows, *_AGGREGATOR)


def _to_ours(state: Data, norm: bool) -> tuple[dict[str, Any], list[str]]:
    theirs = {
        name: tensor.of_array(
            value.transpose(2, 3, 1, 0) if name == "agg.weight" else value
        )
        for name, value in state.items() if not name.endswith(_BUFFER)
    }
    return spellings.to_ours(_table(norm), theirs)


def _ids(data: Data) -> masking.TokenIds:
    hidden = data["mask"].reshape(len(data["mask"]), -1).astype(bool)
    thrown = data.get("thrown_mask", np.zeros_like(data["mask"]))
    thrown = thrown.reshape(hidden.shape).astype(bool)

    def where(mask):
        return jnp.asarray(np.stack([np.flatnonzero(row) for row in mask]))

    return masking.TokenIds(where(~hidden), where(hidden & ~thrown), where(thrown))


def check(_path: Path, data: Data, report: Report) -> None:
    """Activations, loss and gradients of one forward and backward pass."""
    compared = _check(data, report, norm=False, prefix="")
    if "before_norm/loss" in data:
        compared |= _check(data, report, norm=True, prefix="before_norm/")
    inputs = {"config", "imgs", "mask", "thrown_mask"}
    left = [
        name for name in data
        if name not in compared | inputs and not name.startswith("sd/")
    ]
    if left:
        raise ValueError(f"Not compared: {', '.join(left)}.")


def _check(data: Data, report: Report, *, norm: bool, prefix: str) -> set[str]:
    reference, state = json.loads(str(data["config"])), prefixed(data, "sd/")
    objective = Pretrain(_config(reference, state, norm=norm))
    _check_counts(objective, reference, report)
    like = jax.eval_shape(objective.init, jax.random.key(0))
    ours, left_over = _to_ours(state, norm)
    variables = jax.tree.map(jnp.asarray, names.variables_of(
        ours, like, table=_table(norm), left_over=left_over
    ))
    images, ids = jnp.asarray(nhwc(data["imgs"])), _ids(data)
    ids_of_counts = tuple(part.shape[1] for part in ids)
    report.exact("counts", ids_of_counts, objective.counts)

    def forward(params):
        seen = _outputs(objective, {**variables, "params": params}, images, ids)
        return seen["loss"], seen

    (_, seen), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(
        variables["params"]
    )
    compared = set()
    for name in (name for name in seen if f"{prefix}{name}" in data):
        compared.add(f"{prefix}{name}")
        if name == "loss":
            report.loss(f"{prefix}loss", seen[name], data[f"{prefix}loss"])
        elif name == "kept_ids":
            report.exact(name, seen[name], data[name])
        else:
            report.output(f"{prefix}{name}", seen[name], data[f"{prefix}{name}"])
    expected = prefixed(data, f"{prefix}grad/")
    compared |= {f"{prefix}grad/{name}" for name in expected}
    _compare_gradients(f"{prefix}grad/", gradients, expected, norm, report)
    return compared


def _check_counts(objective: Pretrain, reference: dict, report: Report) -> None:
    """How many units are masked: SimMIM rounds up."""
    if "mask_count_coarse" in reference:
        masked = objective.num_patches - objective.counts.num_keep
        area = objective.sampler.unit**2
        report.exact("masked units", masked // area, reference["mask_count_coarse"])
    if "n_masked_patches" in reference:
        masked = objective.num_patches - objective.counts.num_keep
        report.exact("masked patches", masked, reference["n_masked_patches"])


def _compare_gradients(prefix, gradients, expected, norm, report) -> None:
    ours = traverse_util.flatten_dict(gradients, sep="/")
    theirs, left_over = _to_ours(expected, norm)
    if left_over:
        raise ValueError(f"Gradients of other tensors: {left_over}.")
    for name, value in theirs.items():
        report.gradient(f"{prefix}{name}", ours[name], value.read())


def _outputs(objective: Pretrain, variables, images, ids) -> dict[str, Any]:
    """Returns activations under the fixture's names and in its layouts."""
    model, grid = objective.model, objective.grid
    predicted, state = model.apply(
        variables, images, ids, mutable=["intermediates"],
        capture_intermediates=lambda _, method: method in ("__call__", "lay_out"),
    )
    loss, _ = objective.prediction_loss(
        predicted, objective.target(variables, images), ids
    )
    seen = state["intermediates"]
    encoded = seen["encoder"]["__call__"][0]
    everything = at_all_places(model, variables, encoded, ids, seen)
    patch_size = objective.patch_size

    def channels_first(x):
        return einops.rearrange(x, "b row col d -> b d row col")

    outputs = {
        "loss": loss,
        "encoder_input": encoded.maps[0].sequence,
        "encoder_output": encoded.maps[-1].sequence,
        "features": channels_first(everything["features"]),
        "reconstruction": einops.rearrange(
            everything["predicted"], "b (row col) (p q c) -> b c (row p) (col q)",
            row=grid[0], p=patch_size, q=patch_size,
        ),
    }
    if encoded.last.ids is not None:
        outputs["kept_ids"] = encoded.last.ids
    if "aggregator" in seen:
        outputs["conv_input"] = channels_first(seen["aggregator"]["lay_out"][0])
        outputs["conv_output"] = channels_first(
            seen["aggregator"]["mixer"]["__call__"][0]
        )
    return outputs


def at_all_places(model, variables, encoded, ids, seen) -> dict[str, Any]:
    """Returns what the linear layer sees and predicts, at visible places, too."""
    whole = encoded.last.at(None)
    num = whole.shape[1]
    if "aggregator" in seen:
        mixed = seen["aggregator"]["mixer"]["__call__"][0].reshape(whole.shape)
        thrown = masking.mask_of(ids.thrown, num_patches=num)
        whole = jnp.where(thrown[:, :, None], mixed, whole)
    places = jnp.broadcast_to(jnp.arange(num)[None], whole.shape[:2])
    head = nn.apply(
        lambda model, *args: model.decoder.head(*args), model,
        mutable=["intermediates"], capture_intermediates=True,
    )
    predicted, state = head(
        variables, "pixels", Tokens(whole, places, model.encoder.grid),
        ids._replace(keep=ids.keep[:, :0]), {},
    )
    if model.decoder.norm:
        whole = state["intermediates"]["decoder"]["decoder_norm"]["__call__"][0]
    return {
        "features": whole.reshape(len(whole), *model.encoder.grid, -1),
        "predicted": predicted.values,
    }
