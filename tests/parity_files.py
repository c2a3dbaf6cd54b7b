"""Parity of what needs no model: pixels, position tables, counts, schedules."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import masking
from crossmae_jax.models import posemb, vit
from crossmae_jax.optim import optimizers
from crossmae_jax.targets import pixels
from crossmae_jax.tokens import grid_size, patchify, unpatchify
from tests.parity_report import OUTPUT, Report

Data = dict[str, np.ndarray]


def load_npz(path: Path) -> Data:
    """Reads every array of a file; pickled objects are refused."""
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def nhwc(images: np.ndarray) -> np.ndarray:
    """Puts the channels of PyTorch images last."""
    return images.transpose(0, 2, 3, 1)


def check_pixels(_path: Path, data: Data, report: Report) -> None:
    """Patch vectors both ways, statistics and standardised targets."""
    for name in [name for name in data if name.startswith("imgs/")]:
        key = name.removeprefix("imgs/")
        images = jnp.asarray(nhwc(data[name]))
        expected = data[f"patches/{key}"]
        channels = images.shape[-1]
        patch_size = round((expected.shape[-1] / channels) ** 0.5)
        grid = grid_size(images.shape[1:3], patch_size)
        values = patchify(images, patch_size=patch_size)
        report.exact(f"patches/{key}", values, expected)
        back = unpatchify(values, grid=grid, patch_size=patch_size)
        report.exact(f"imgs/{key} put together again", back, images)
        if f"norm_target/{key}" in data:
            mean, std = pixels.patch_statistics(values)
            # An ulp of the largest pixel. The tolerances hold for values up to ten,
            # and a patch of almost one value magnifies the rounding of its own mean
            # by the inverse of its deviation.
            ulp = np.abs(data[name]).max() * np.finfo(np.float32).eps
            if f"mean/{key}" in data:
                report.output(
                    f"mean/{key}", mean, data[f"mean/{key}"], max(OUTPUT, 4 * ulp)
                )
            if f"var/{key}" in data:
                root = np.sqrt(data[f"var/{key}"] + 1e-6)
                report.output(f"std/{key}", std, root, max(OUTPUT, 4 * ulp))
            report.output(
                f"norm_target/{key}",
                pixels.standardised(values),
                data[f"norm_target/{key}"],
                max(OUTPUT, 2 * ulp / float(np.asarray(std).min())),
            )


def check_posembed(_path: Path, data: Data, report: Report) -> None:
    """Sine-cosine tables, and their bicubic resizing."""
    for name, expected in data.items():
        if name.startswith("sincos_"):
            grid = round((expected.shape[0] - 1) ** 0.5)
            ours = posemb.sincos((grid, grid), expected.shape[1])
            report.output(name, ours, expected)
        elif name.startswith("interp_in/"):
            resized = data[name.replace("_in", "_out")]
            sides = [
                round((table.shape[1] - 1) ** 0.5) for table in (expected, resized)
            ]
            ours = posemb.resize(
                expected[0], grid=(sides[0], sides[0]), new_grid=(sides[1], sides[1])
            )
            report.output(name, ours[None], resized)


def token_counts(num_patches: int, mask_ratio: float, pred_ratio: float):
    """Returns our counts; where we refuse what the reference does, the reference's.

    A prediction ratio above the mask ratio makes the reference predict some visible
    patches as well. The rest of the model can still be compared there.
    """
    if pred_ratio <= mask_ratio:
        return masking.token_counts(
            num_patches, mask_ratio=mask_ratio, pred_ratio=pred_ratio
        )
    num_keep = int(num_patches * (1 - mask_ratio))
    num_skip = int(num_patches * (mask_ratio - pred_ratio))
    return masking.TokenCounts(num_keep, num_patches - num_keep - num_skip, 0)


def check_masking_counts(rows: list[dict], report: Report) -> None:
    """Numbers of visible and predicted patches."""
    for row in rows:
        counts = token_counts(row["L"], row["mask_ratio"], row["kept_mask_ratio"])
        report.exact(
            f"{row['L']} patches at {row['mask_ratio']}/{row['kept_mask_ratio']}",
            counts, (row["len_keep"], row["n_predicted"], 0),
        )


def check_schedules(data: dict, report: Report) -> None:
    """Peak rates, the rate of every step, and rates of stochastic depth."""
    for case in data.get("drop_path", ()):
        ours = vit.drop_path_rates(case["drop_path_rate"], depth=case["depth"])
        report.output(
            f"stochastic depth of {case['depth']} blocks", ours, case["per_block"],
            allowed=1e-7,
        )
    for case in data.get("lr_rule", ()):
        base_lr, kind = case["blr"], "pred_over_mask"
        if case["no_lr_scale"]:
            kind = "none"
        elif case["inverse_lr"]:  # which here is another base rate
            base_lr *= case["mask_ratio"] / case["kept_mask_ratio"]
            kind = "none"
        batch = case["batch_size"] * case["accum_iter"] * case["world_size"]
        config = ConfigDict(dict(
            optim=dict(base_lr=base_lr, base_batch=256, lr_scale=kind),
            data=dict(batch_size=batch),
            masking=dict(
                mask_ratio=case["mask_ratio"], pred_ratio=case["kept_mask_ratio"]
            ),
        ))
        report.loss(f"peak rate {kind}", optimizers.peak_lr(config), case["lr"])
    for case in data.get("lr_sched", ()):
        steps = np.arange(len(case["lr_per_data_step"]))
        epoch, step = np.divmod(steps, case["steps_per_epoch"])
        # The reference refreshes the rate at the first step of an accumulation group.
        first = step - step % case["accum_iter"]
        ours = optimizers.warmup_cosine(
            jnp.asarray(epoch + first / case["steps_per_epoch"], jnp.float32),
            peak=case["lr"], min_lr=case["min_lr"],
            warmup_epochs=float(case["warmup_epochs"]), epochs=float(case["epochs"]),
        )
        expected = np.asarray(case["lr_per_data_step"])
        report.output(
            f"rate over {case['epochs']} epochs", ours / case["lr"],
            expected / case["lr"], allowed=1e-6,
        )
