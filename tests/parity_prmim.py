"""Parity of PR-MIM: progressive reconstruction from decoder tokens, furthest choice."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Tokens
from tests.parity_files import Data, nhwc
from tests.parity_report import Report

# Ours (flat, under "params"), theirs, and what turns their layout into ours.
_NAMES = (
    ("aggregator/mixer/kernel", "conv_weight", lambda w: w.transpose(2, 3, 1, 0)),
    ("aggregator/mixer/bias", "conv_bias", lambda w: w),
    ("decoder/decoder_norm/scale", "norm_weight", lambda w: w),
    ("decoder/decoder_norm/bias", "norm_bias", lambda w: w),
    ("decoder/decoder_pred/kernel", "linear_weight", lambda w: w.T),
    ("decoder/decoder_pred/bias", "linear_bias", lambda w: w),
)


def _objective(reference: dict, data: Data) -> Pretrain:
    """Makes a PR-MIM whose decoder ends as the fixture does; its encoder is unused."""
    grid = reference["H"], reference["W"]
    height, width, channels = nhwc(data["imgs"]).shape[1:]
    patch_size, dim = height // grid[0], data["dec_ret"].shape[2]
    model = common.mae(
        f"W4-D1-H1/{patch_size}", decoder_dim=dim, decoder_heads=1, decoder_depth=1
    )
    model["dtype"] = "float32"
    model["aggregator"].update(kind="conv", kernel_size=reference["kernel"])
    num_patches = grid[0] * grid[1]
    objective = Pretrain(ConfigDict(dict(
        model=model,
        # Any ratios that throw something: the fixture brings its own token ids.
        masking=common.masking(pred_ratio=0.75, throw_ratio=0.25),
        target=dict(kind="pixels", normalize=bool(reference["norm_pix"])),
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        data=dict(
            image_size=(height, width), channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    )))
    assert objective.num_patches == num_patches
    return objective


def _nested(flat: dict) -> dict:
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def check_reconstruction(_path: Path, data: Data, report: Report) -> None:
    """The aggregator's input and output, both predictions, loss and all gradients."""
    objective = _objective(json.loads(str(data["config"])), data)
    ids = masking.TokenIds(
        *(jnp.asarray(data[f"{name}_ids"]) for name in ("vis", "ret", "thr"))
    )
    images = jnp.asarray(nhwc(data["imgs"]))
    inputs = {
        ours: jnp.asarray(change(data[theirs])) for ours, theirs, change in _NAMES
    } | {name: jnp.asarray(data[name]) for name in ("dec_vis", "dec_ret")}

    num_images, num_retained, dim = data["dec_ret"].shape
    num_patches = objective.num_patches
    table = {"decoder_pos_embed": jnp.zeros((1 + num_patches, dim))}  # not used

    def forward(inputs):
        params = _nested({k: v for k, v in inputs.items() if "/" in k})
        params["decoder"]["mask_token"] = jnp.zeros((1, 1, dim))  # not used
        decoded = Tokens(
            jnp.concatenate([inputs["dec_vis"], inputs["dec_ret"]], axis=1),
            jnp.concatenate([ids.keep, ids.pred], axis=1), objective.grid,
        )
        predicted, state = objective.model.apply(
            {"params": params, "constants": {"decoder": table}},
            {"pixels": decoded}, ids, {}, None,
            method="complete",
            capture_intermediates=lambda _, method: method in ("__call__", "lay_out"),
            mutable=["intermediates"],
        )
        loss, aux = objective.prediction_loss(
            predicted, objective.target({}, images), ids
        )
        seen = state["intermediates"]["aggregator"]
        return loss, (predicted["pixels"], aux.metrics, seen)

    (loss, (pred, logged, seen)), gradients = jax.jit(
        jax.value_and_grad(forward, has_aux=True)
    )(inputs)
    target = objective.target({}, images)["pixels"].at(pred.ids)
    hidden, pred = pred.ids, pred.values
    error = jnp.mean((pred - target) ** 2, axis=-1)
    mixed = seen["mixer"]["__call__"][0].reshape(num_images, num_patches, dim)
    outputs = {
        "conv_input": seen["lay_out"][0].reshape(num_images, num_patches, dim),
        "conv_output": mixed,
        "thrown_features": seen["__call__"][0].at(ids.thrown),
        "pred_retained": pred[:, :num_retained],
        "pred_thrown": pred[:, num_retained:],
        "target_retained": target[:, :num_retained],
        "target_thrown": target[:, num_retained:],
        "loss_per_patch": error,
    }
    masks = {
        "mask": masking.mask_of(hidden, num_patches=num_patches),
        "thrown_mask": masking.mask_of(ids.thrown, num_patches=num_patches),
    }
    for name in sorted(data.keys() & outputs.keys()):
        report.output(name, outputs[name], data[name])
    for name in sorted(data.keys() & masks.keys()):
        report.exact(name, masks[name], data[name].astype(bool))
    if "loss" in data:
        report.loss("loss", loss, data["loss"])
    sizes = np.array([num_retained, ids.thrown.shape[1]])
    parts = np.array([logged["loss_retained"], logged["loss_thrown"]])
    report.loss("mean over both groups", (sizes @ parts) / sizes.sum(), loss)
    layouts = {ours: (theirs, change) for ours, theirs, change in _NAMES}
    for ours, gradient in gradients.items():
        theirs, change = layouts.get(ours, (ours, lambda w: w))
        if f"grad/{theirs}" in data:
            report.gradient(f"grad/{theirs}", gradient, change(data[f"grad/{theirs}"]))
    known = (
        {"config", "imgs", "loss", "vis_ids", "ret_ids", "thr_ids"} | inputs.keys()
        | outputs.keys() | masks.keys() | {theirs for _, theirs, _ in _NAMES}
    )
    known |= {f"grad/{name}" for name in known}
    if left := [name for name in data if name not in known]:
        raise ValueError(f"Not compared: {', '.join(left)}.")


def check_furthest(cases: list[dict], report: Report) -> None:
    """The order in which patches are chosen; ties go to the first in the list."""
    choose = jax.jit(masking.furthest, static_argnames=("num", "columns"))
    for number, case in enumerate(cases):
        masked = np.asarray([case["masked"]], np.int32)
        chosen = choose(
            masked, np.asarray([case["first_position"]], np.int32),
            num=case["K"], columns=case["W"],
        )
        what = f"case {number}: {case['K']} of {masked.shape[1]}"
        report.exact(what, chosen[0], case["retained_positions"])
        if "retained_patches" in case:
            report.exact(
                f"{what}, patches", masked[0, chosen[0]], case["retained_patches"]
            )
