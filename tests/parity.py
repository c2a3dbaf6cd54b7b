"""Compares our modules with numbers of the PyTorch references, file by file.

    python -m tests.parity FILE...

prints a line per file: its name, the worst absolute error of an output, the worst error
of a gradient as a share of the largest entry of its tensor, and pass, FAIL or
unsupported. What a file holds is read from its content, sizes from its own `config`.
The exit status is 0 only if every file passes: 1 if one fails, 2 if none fails but some
are of a kind not covered here. `--verbose` lists every comparison.

Tolerances (float32; tests never loosen them): outputs 3e-5 absolute, losses 2e-6
relative, gradients 5e-5 of the largest entry of the tensor plus 2e-6, masks, counts and
indices exact. After five AdamW updates the float32 references themselves are 6e-5 from
float64, so trajectories of parameters are held to that.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import jax

from tests import (
    parity_amt,
    parity_files,
    parity_finetune,
    parity_local,
    parity_mff,
    parity_models,
    parity_prmim,
    parity_simmim,
    parity_swin,
    parity_tec,
    parity_weights,
)
from tests.parity_report import Report

jax.config.update("jax_default_matmul_precision", "highest")


def _kind(data) -> str:
    """Names the kind of an `.npz` file by the arrays it holds."""
    config = json.loads(str(data["config"])) if "config" in data else {}
    reference = config.get("class", "")
    if {"refreshed_map", "keys"} <= set(data):
        return "AMT"
    if {"target_feature_norm", "pred_attention"} <= set(data):
        return "TEC"
    if {"dec_vis", "dec_ret"} <= set(data):
        return "progressive reconstruction"
    if "checkpoint" in config or "weights" in config:
        return "weights"
    if reference.startswith("models_vit.") and "labels" in data:
        return "fine-tuning trajectory" if "losses" in data else "classifier"
    if {"running_mean", "running_var"} <= set(data):
        return "linear probe"
    if any(name.startswith("momentum/") for name in data):
        return "LARS"
    ours = reference.startswith(("models_mae.", "models_cross."))
    if reference == "SimMIM" and config["encoder"] == "swin":
        return "SimMIM with Swin"
    if parity_swin.is_green(config):
        return "GreenMIM"
    if reference == "SimMIM" and config["encoder"] == "vit" or (
        {"thrown_mask", "features"} <= set(data)
    ):
        return "SimMIM"
    if "hog_tokens/0" in data:
        return "oriented gradients"
    if reference.startswith("LocalMIM"):
        return "LocalMIM"
    if {"fusion_weights", "fused_before_norm"} <= set(data):
        return "multi-level fusion"
    if {"config", "table"} == set(data):
        return "transposed posembed"
    if any(name.startswith("patches/") for name in data):
        return "pixels"
    if any(name.startswith(("sincos_", "interp_in/")) for name in data):
        return "posembed"
    if ours and "losses" in data:
        return "trajectory"
    if ours and "loss" in data:
        return "model"
    return ""


NPZ_CHECKS = {
    "pixels": parity_files.check_pixels,
    "posembed": parity_files.check_posembed,
    "trajectory": parity_models.check_trajectory,
    "weights": parity_weights.check,
    "model": parity_models.check_model,
    "multi-level fusion": parity_mff.check_fusion,
    "transposed posembed": parity_mff.check_posembed,
    "progressive reconstruction": parity_prmim.check_reconstruction,
    "SimMIM": parity_simmim.check,
    "SimMIM with Swin": parity_swin.check_simmim,
    "GreenMIM": parity_swin.check_green,
    "AMT": parity_amt.check,
    "TEC": parity_tec.check,
    "LocalMIM": parity_local.check_model,
    "oriented gradients": parity_local.check_target,
    "classifier": parity_finetune.check_classifier,
    "fine-tuning trajectory": parity_finetune.check_trajectory,
    "linear probe": parity_finetune.check_linear_probe,
    "LARS": parity_finetune.check_lars,
}


def check(path: Path) -> Report:
    """Runs every comparison that a fixture file allows.

    A file that cannot be read, lacks what its kind needs, or is refused by our code
    (weights that do not fit) fails with the reason.
    """
    report = Report(path.name)
    try:
        _compare(path, report)
    except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        report.failed = True
        report.lines.append(f"FAIL {type(error).__name__}: {error}")
    return report


def _compare(path: Path, report: Report) -> None:
    if not path.exists():
        raise FileNotFoundError("no such file")
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        if isinstance(data, list) and data and "len_keep" in data[0]:
            parity_files.check_masking_counts(data, report)
        elif isinstance(data, list) and data and "retained_positions" in data[0]:
            parity_prmim.check_furthest(data, report)
        elif isinstance(data, list) and data and "layer_decay" in data[0]:
            parity_finetune.check_layer_decay(data, report)
        elif isinstance(data, dict) and {"lr_sched", "lr_rule"} & set(data):
            parity_files.check_schedules(data, report)
    elif path.suffix == ".npz":
        kind = _kind(data := parity_files.load_npz(path))
        if kind:
            NPZ_CHECKS[kind](path, data, report)
    elif path.suffix in (".pth", ".safetensors"):
        if found := parity_weights.expected_of(path):
            parity_weights.check(path, found[0], report)


def main(argv: list[str] | None = None) -> int:
    """Checks the files named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--verbose", action="store_true", help="list every comparison")
    arguments = parser.parse_args(argv)
    statuses = set()
    for path in arguments.files:
        report = check(path)
        print(report.row(), flush=True)
        statuses.add(report.status)
        for line in report.lines:
            if arguments.verbose or line.startswith("FAIL"):
                print(f"    {line}")
    return 1 if "FAIL" in statuses else 2 if "unsupported" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
