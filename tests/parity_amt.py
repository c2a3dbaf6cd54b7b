"""Parity of AMT (arXiv 2211.15362): weights, order, groups, model, refreshed maps."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crossmae_jax import masking
from crossmae_jax.data.fields import View
from crossmae_jax.objectives.pretrain import Pretrain
from tests import parity_models
from tests.parity_files import Data, nhwc
from tests.parity_report import Report

_COMPARED = {
    # `uniform` and with it `keys` are drawn; `ids_restore` is the order the other way,
    # and `attention_class_row` what `refreshed_map` is made of.
    "maps", "weights", "uniform", "keys", "order", "n_masked_thrown_visible", "mask",
    "ids_restore", "masked_ids", "thrown_ids", "visible_ids", "latent", "pred", "loss",
    "attention_class_row", "refreshed_map", "counts",
}


def _options(mask_ratio: float, throw_ratio: float) -> dict:
    """Returns AMT's shares of all patches as ours; thrown ones are not predicted."""
    return dict(
        mask_ratio=mask_ratio + throw_ratio, pred_ratio=mask_ratio, rounding="ceil"
    )


def _objective(reference: dict, data: Data) -> tuple[Pretrain, dict]:
    """Makes an MAE that throws, with the fixture's weights."""
    config = parity_models.make_config({
        "class": "models_mae.", "ctor": reference, "forward": {},
        "layernorm_eps": reference.get("layernorm_eps", 1e-6),
    })
    config.masking.update(
        _options(reference["mask_ratio"], reference["throw_ratio"])
    )
    return parity_models.load(config, parity_models.prefixed(data, "sd/"))


def _check_weights(objective: Pretrain, data: Data, report: Report) -> None:
    """The crop's weights: sums over each patch of a map of the image's size."""
    side, grid = objective.patch_size, objective.grid
    weights = []
    for values in np.asarray(data["maps"])[:, 0]:
        height, width = values.shape
        view = View(values.shape, (0.0, 0.0, float(width), float(height)), False,
                    grid, grid)
        means = view.raster(values, nearest=False, fill=0.0)
        weights.append(means.reshape(-1) * side**2)
    report.output("weights", np.stack(weights), data["weights"])


def _check_groups(
    objective: Pretrain, data: Data, report: Report
) -> masking.TokenIds:
    """Which patches are masked, thrown and visible; returns the first and the last."""
    counts = objective.sampler.counts
    num_masked, num_thrown, num_visible = data["n_masked_thrown_visible"].tolist()
    report.exact("n_visible", counts.num_keep, num_visible)
    report.exact("n_masked", counts.num_pred, num_masked)
    order = np.argsort(-data["keys"], axis=1, kind="stable")
    report.exact("order", order, data["order"])
    ids = masking.token_ids(jnp.asarray(data["keys"]), counts)
    report.exact("masked_ids", ids.pred, np.sort(data["masked_ids"], axis=1))
    # Ours come by rising noise, theirs by falling.
    report.exact("visible_ids", ids.keep[:, ::-1], data["visible_ids"])
    num_patches = objective.num_patches
    masked, visible = (
        np.asarray(masking.mask_of(x, num_patches=num_patches))
        for x in (ids.pred, ids.keep)
    )
    report.exact("mask", 1.0 * masked - ~(masked | visible), data["mask"])
    thrown = ~(masked | visible)
    report.exact("n_thrown", thrown.sum(1), np.full(len(thrown), num_thrown))
    return ids._replace(keep=ids.keep[:, ::-1])


def check(_path: Path, data: Data, report: Report) -> None:
    """One forward and backward pass, and what decides which patches it is of."""
    reference = json.loads(str(data["config"]))
    objective, variables = _objective(reference, data)
    _check_weights(objective, data, report)
    ids = _check_groups(objective, data, report)
    images = jnp.asarray(nhwc(data["imgs"]))

    def run(variables, images, ids):
        outputs = parity_models.model_outputs(objective, variables, images, ids)
        batch = {"image": images}
        maps = objective.outputs["attention_map"](variables, batch)
        return outputs, maps

    objective.normalize = lambda batch: batch["image"]  # theirs are normalised already
    outputs, maps = jax.jit(run)(variables, images, ids)
    seen = jnp.sort(jnp.concatenate([ids.keep, ids.pred], axis=1), axis=1)
    pred = jnp.take_along_axis(outputs["pred"], seen[:, :, None], axis=1)
    report.output("latent", outputs["latent"], data["latent"])
    report.output("pred", pred, data["pred"])
    report.loss("loss", outputs["loss"], data["loss"])
    report.output("refreshed_map", maps, data["refreshed_map"])

    def loss(params):
        return objective.masked_loss({**variables, "params": params}, images, ids)[0]

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    parity_models.compare_gradients("grad/", gradients, data, report)
    for *given, masked, thrown, visible in data["counts"].tolist():
        _check_counts(given, (masked, thrown, visible), report)
    parity_models.nothing_left_out(_COMPARED, data, report)


def _check_counts(given: list[float], expected: tuple, report: Report) -> None:
    num, mask_ratio, throw_ratio = given
    ratios = (round(mask_ratio, 6), round(throw_ratio, 6))  # they lie as float32
    if not expected[2]:
        return  # none is visible, which we refuse: tests/test_amt.py
    counts = masking.token_counts(int(num), **_options(*ratios))
    thrown = int(num) - counts.num_keep - counts.num_pred
    report.exact(
        f"counts of {int(num)}, {ratios}",
        (counts.num_pred, thrown, counts.num_keep), expected,
    )
