"""Every file in configs/ is a complete, documented experiment."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from crossmae_jax.objectives import OBJECTIVES
from crossmae_jax.optim import optimizers
from tests import cost_formulas

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
NAMES = [path.stem for path in FILES]
CLASSIFY = [
    path for path in FILES
    if path.stem.startswith(("finetune", "partialft", "linprobe", "transfer"))
]
PRETRAIN = [path for path in FILES if path not in CLASSIFY]
PRETRAIN_NAMES, CLASSIFY_NAMES = (
    [path.stem for path in paths] for paths in (PRETRAIN, CLASSIFY)
)

KEYS = {
    "seed": int, "objective": str, "epochs": float, "log_every_steps": int,
    "watchdog_minutes": float, "log_norms": bool, "baselines": bool,
    "init_from": str, "init_channels": str,
    "model": {
        "encoder": {
            "kind": str, "size": str, "mlp_ratio": float, "drop_path": float,
            "positions": str, "relative_bias": str, "qkv_bias": str,
            "layer_scale": None, "mask_tokens": bool, "cls_token_mlp": bool,
            "weight_init": str,
        },
        "fusion": {"kind": str, "maps": None, "input": bool},
        "decoder": {
            "kind": str, "dim": int, "depth": int, "num_heads": int, "mlp_ratio": float,
            "self_attention": bool,
        },
        "aggregator": {
            "kind": str, "kernel_size": int, "visible": str, "rewrites_retained": bool,
        },
        "remat": str, "dtype": str,
    },
    "masking": {
        "mask_ratio": float, "pred_ratio": float, "throw_ratio": float, "retain": str,
        "noise": str, "together": int, "unit": int, "rounding": str, "throw_by": str,
    },
    "attention_maps": {
        "every_epochs": float,
        "before": {"mask_ratio": float, "pred_ratio": float, "throw_ratio": float},
    },
    "target": {"kind": str, "normalize": bool},
    "loss": {"kind": str, "thrown_weight": float, "weights": {}},
    "optim": {
        "base_lr": float, "min_lr": float, "warmup_epochs": float,
        "weight_decay": float, "b1": float, "b2": float, "lr_scale": str,
        "clip_norm": None, "accum_steps": int, "name": str, "decay_tokens": bool,
        "layer_decay": float, "trust_coefficient": float, "max_skipped_in_a_row": int,
        "base_batch": int, "schedule": str, "drop_epochs": tuple, "drop_factor": float,
        "warmup_lr": float,
    },
    "data": {
        "source": str, "name": str, "data_dir": None, "split": str, "eval_split": str,
        "dir": None, "eval_dir": None, "image_size": tuple, "channels": int,
        "mean": tuple, "std": tuple, "batch_size": int, "transform": str,
        "weights_grid": None, "crop": str, "crop_scale": tuple, "flip": bool,
        "interpolation": str, "randaug_ops": int,
        "randaug_magnitude": float, "eval_crop_ratio": float, "workers": int,
        "max_bad_share": float, "max_pixels": int, "max_skipped_share": float,
    },
    "checkpoint": {
        "every_epochs": float, "keep": int, "keep_every_epochs": float, "best": str,
    },
    "mesh": {"fsdp": int},
}
SWIN_KEYS = {
    "kind": str, "size": str, "window": int, "mlp_ratio": float, "drop_path": float,
    "mask_tokens": bool, "weight_init": str, "norm_epsilon": float,
}
CLASSIFY_KEYS = {
    key: KEYS[key] for key in KEYS if key not in ("attention_maps", "masking", "target")
} | {
    "model": {
        "encoder": KEYS["model"]["encoder"],
        "pool": str, "head_norm": str, "head_std": float, "remat": str, "dtype": str,
    },
    "augment": {
        "label_smoothing": float, "erasing": float, "mixup": float, "cutmix": float,
        "mixed_together": int,
    },
    "data": KEYS["data"] | {"num_classes": int},
    "tune_blocks": float,
}
del CLASSIFY_KEYS["loss"]
EVALS = {
    "accuracy": {"every_epochs": float},
    "knn": {
        "every_epochs": float, "k": tuple, "pools": tuple, "temperature": float,
        "max_train_images": int,
    },
    "linear": {"every_epochs": float},
    "rank": {"every_epochs": float, "max_images": int},
    "reconstruction": {"every_epochs": float, "num_images": int},
}


def load(path):
    return runpy.run_path(str(path))["get_config"]()


def types_of(config):
    """Returns the type of every value; None stands for a value that is not set."""
    return {
        key: types_of(value) if isinstance(value, ConfigDict)
        else None if value is None else type(value)
        for key, value in config.items()
    }


def test_the_experiments_of_the_papers_are_all_there():
    sizes, kinds = ("vits", "vitb", "vitl", "vith"), ("mae", "cross", "cross75")
    grid = {f"{size}_{kind}" for size in sizes for kind in kinds}
    others = {
        "vitb_cross_448", "vitb_mae_prmim", "vitl_mae_prmim", "vitb_cross_prmim",
        "vitb_mff", "vitb_mff_prmim", "vitb_simmim", "vitb_simmim_100",
        "vitb_simmim_prmim",
        "vitb_local", "vitl_local", "vitb_local_prmim", "digits_local",
        "vitb_amt", "vitb_simmim_amt", "digits_amt",
        "finetune_vitb_local", "finetune_vitl_local",
        "vitb_tec", "vitl_tec", "vitb_tec_prmim", "digits_tec",
        "finetune_vitb_tec", "finetune_vitl_tec",
        "swinb_simmim", "swinb_simmim_100", "swinb_simmim_prmim", "swinl_simmim",
        "digits_simmim_swin", "finetune_swinb_simmim",
        "swinb_green", "swinl_green", "swinb_green_prmim", "digits_green",
        "finetune_swinb_green",
        "digits_simmim", "finetune_vitb_simmim", "digits_cross", "digits_cross_prmim",
        "digits_mae", "folder_cross",
        "folder_cross_knn", "photographs_cross", "photographs_mae",
        "photographs_simmim", "photographs_local",
        "finetune_vits", "finetune_vitb", "finetune_vitl",
        "finetune_vith", "finetune_vitb_448", "finetune_folder", "finetune_digits",
        "partialft_vitb", "linprobe_vitb", "transfer_inat18_vitb",
        "transfer_inat19_vitb", "transfer_places365_vitb", "transfer_vitb",
    }
    assert set(NAMES) == grid | others


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_config_has_every_key_with_its_type_and_no_other(path):
    found = types_of(load(path))
    evals = found.pop("evals")
    expected = KEYS
    if "mff" in path.stem:  # the only ones of these whose maps are named
        expected = KEYS | {"model": KEYS["model"] | {
            "fusion": KEYS["model"]["fusion"] | {"maps": tuple},
        }}
    if "local" in path.stem and path not in CLASSIFY:
        maps = KEYS["model"]["fusion"] | {"maps": tuple}
        expected = KEYS | {"model": KEYS["model"] | {"fusion": maps}, "target": {
            "kind": str, "bins": int, "cells": tuple, "bias": bool, "normalize": bool,
        }}
    if "tec" in path.stem and path not in CLASSIFY:
        fusion = {"kind": str, "groups": int, "hidden": int}
        kinds, weights = (
            {"feature": kind, "attention": kind} for kind in (str, float)
        )
        expected = KEYS | {
            "model": KEYS["model"] | {"fusion": fusion},
            "target": {
                "kind": str, "weights": str, "encoder": KEYS["model"]["encoder"],
                "blocks": int, "top_k": int, "temperature": float, "attention": str,
            },
            "loss": {"kind": kinds, "thrown_weight": float, "weights": weights},
        }
    if "amt" in path.stem:
        data = KEYS["data"] | {"weights_grid": tuple}
        expected = KEYS | {"data": data}
    scaled = KEYS["model"]["encoder"] | {"layer_scale": float}
    if "simmim" in path.stem:  # whose decoder has no block
        expected = expected | {"optim": KEYS["optim"] | {"clip_norm": float}}
        expected["model"] = KEYS["model"] | {
            "encoder": scaled, "fusion": {"kind": str},
            "decoder": {"kind": str, "norm": bool},
        }
    if path in CLASSIFY:
        expected = dict(CLASSIFY_KEYS)
        if "simmim" in path.stem:
            expected["model"] = expected["model"] | {"encoder": scaled}
        if "simmim" in path.stem or "green" in path.stem:
            expected["optim"] = expected["optim"] | {"clip_norm": float}
        # Unset in some of them: the classes are then the data's, all blocks are tuned.
        if found["tune_blocks"] is None:
            expected["tune_blocks"] = None
        if found["data"]["num_classes"] is None:
            expected["data"] = expected["data"] | {"num_classes": None}
    if "swin" in path.stem or "green" in path.stem:
        expected = expected | {"model": expected["model"] | {"encoder": SWIN_KEYS}}
    assert found == expected
    assert evals == {name: EVALS[name] for name in evals}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_config_describes_a_model_and_a_schedule(path):
    config = load(path)
    if path in CLASSIFY:
        config.data.num_classes = config.data.num_classes or 10
        objective = OBJECTIVES["classify"](config)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        bias = shapes["params"]["head"]["bias"]
        assert bias.shape == (config.data.num_classes or 10,)
        optimizers.make_optimizer(config, lambda step: 1.0)
    else:
        OBJECTIVES[config.objective](config)
    optimizers.make_schedule(config, steps_per_epoch=10.0)
    assert len(config.data.mean) == len(config.data.std) == config.data.channels


@pytest.mark.parametrize("name", [
    name for name in PRETRAIN_NAMES
    if name.startswith("vit") and not re.search("simmim|local|amt|tec", name)
])
def test_the_recipe_is_the_papers(name):
    config = load(ROOT / "configs" / f"{name}.py")
    size, kind = name.split("_", 1)
    model = config.model
    assert model.encoder.size == {
        "vits": "S/16", "vitb": "B/16", "vitl": "L/16", "vith": "H/14"
    }[size]
    assert (model.decoder.dim, model.decoder.num_heads) == (
        (256, 8) if size == "vits" else (512, 16)
    )
    mae, progressive = not kind.startswith("cross"), kind.endswith("prmim")
    method = ("mae", "last", 8) if mae else ("cross", "inter_block", 12)
    fuses = kind.startswith("mff")
    if fuses:
        method = ("mae", "multi_level", 8)
    assert (model.decoder.kind, model.fusion.kind, model.decoder.depth) == method
    maps = (0, 2, 4, 6, 8, 11) if fuses else None
    assert model.fusion.input and model.fusion.maps == maps
    assert config.optim.decay_tokens == (not fuses)
    ratio = 0.75 if mae or progressive or kind == "cross75" else 0.25
    assert (config.masking.mask_ratio, config.masking.pred_ratio) == (0.75, ratio)
    assert config.data.batch_size == 4096
    # CrossMAE 0.25 at a batch of 4096: 1.5e-4 * 16 / 3.
    expected = 2.4e-3 if ratio == 0.75 else 8e-4
    assert optimizers.peak_lr(config) == pytest.approx(expected)
    thrown = (0.5, "furthest", "conv") if progressive else (0.0, "random", "none")
    assert (
        config.masking.throw_ratio, config.masking.retain, model.aggregator.kind
    ) == thrown
    assert config.optim.lr_scale == ("none" if progressive else "pred_over_mask")
    assert model.aggregator.visible == ("decoder" if mae else "encoder")
    epochs = (400, 20) if kind == "cross_448" else (800, 40)
    assert (config.epochs, config.optim.warmup_epochs) == epochs


def test_the_recipes_of_fine_tuning_are_the_references():
    rates = {  # size: epochs, base rate, decay by layer, stochastic depth
        "vits": (100, 5e-4, 0.65, 0.1), "vitb": (100, 5e-4, 0.65, 0.1),
        "vitl": (50, 1e-3, 0.75, 0.2), "vith": (50, 1e-3, 0.75, 0.3),
        "vitb_448": (100, 5e-4, 0.65, 0.1),
    }
    for name, expected in rates.items():
        config = load(ROOT / "configs" / f"finetune_{name}.py")
        assert (
            config.epochs, config.optim.base_lr, config.optim.layer_decay,
            config.model.encoder.drop_path,
        ) == expected
        assert optimizers.peak_lr(config) == pytest.approx(4 * config.optim.base_lr)
        assert (config.optim.min_lr, config.optim.warmup_epochs) == (1e-6, 5.0)
        assert config.augment.to_dict() == dict(
            label_smoothing=0.1, erasing=0.25, mixup=0.8, cutmix=1.0, mixed_together=32
        )
        assert (config.model.pool, config.model.head_std) == ("mean", 2e-5)
        assert (config.data.randaug_ops, config.data.randaug_magnitude) == (2, 9.0)
    probe = load(ROOT / "configs" / "linprobe_vitb.py")
    assert optimizers.peak_lr(probe) == pytest.approx(6.4)
    assert (probe.optim.name, probe.optim.weight_decay, probe.tune_blocks) == (
        "lars", 0.0, 0.0
    )
    assert (probe.model.pool, probe.model.head_norm) == ("cls", "batch")
    assert not any(
        probe.augment[name]
        for name in ("label_smoothing", "erasing", "mixup", "cutmix")
    )


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_header_names_paper_command_and_numbers(path):
    header = path.read_text().split('"""')[1]
    assert re.search(r"arXiv\s+\d{4}\.\d{5}", header)
    assert f"--config=configs/{path.stem}.py" in header and "--workdir=" in header
    assert re.search(r"^Published.*: ", header, re.MULTILINE)
    assert "Measured by us: " in header


def test_configs_import_neither_jax_nor_the_library():
    code = (
        "import runpy, sys\n"
        f"for path in {[str(path) for path in FILES]}:\n"
        "    runpy.run_path(path)['get_config']()\n"
        "heavy = {'jax', 'flax', 'crossmae_jax', 'tensorflow_datasets', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_two_experiments_share_no_state():
    first, second = (load(ROOT / "configs" / "digits_cross.py") for _ in range(2))
    first.model.decoder.depth = 99
    assert second.model.decoder.depth != 99
    assert load(ROOT / "configs" / "digits_mae.py").model.decoder.depth != 99


def rows():
    """Returns the cells of docs/configs.md, by config."""
    lines = (ROOT / "docs" / "configs.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        row[0].strip("`"): row for row in cells
        if re.fullmatch(r"`\w+`", row[0]) and len(row) > 2  # a setting has two cells
    }


def test_the_table_of_configs_is_complete():
    assert set(rows()) == set(NAMES)


@pytest.mark.parametrize("path", CLASSIFY, ids=CLASSIFY_NAMES)
def test_the_table_of_classifiers_states_their_recipe(path):
    config = load(path)
    tuned = "all" if config.tune_blocks is None else f"{config.tune_blocks:g}"
    assert rows()[path.stem][1:6] == [
        config.model.encoder.size, tuned, f"{config.epochs:g}",
        f"{config.optim.base_lr:g}", f"{config.optim.layer_decay:g}",
    ]


@pytest.mark.parametrize("path", PRETRAIN, ids=PRETRAIN_NAMES)
def test_the_table_of_configs_states_the_counted_cost(path):
    counted = cost_formulas.pretraining(load(path))
    assert rows()[path.stem][1:5] == [
        f"{counted.num_keep} of {counted.num_patches}",
        str(counted.num_pred) + (
            f" + {counted.num_thrown} thrown" if counted.num_thrown else ""
        ),
        f"{counted.params / 1e6:.2f}",
        f"{counted.macs / 1e9:.3f}",
    ]


@pytest.mark.parametrize("path", PRETRAIN, ids=PRETRAIN_NAMES)
def test_the_table_of_configs_states_the_published_number_of_the_header(path):
    header = " ".join(path.read_text().split('"""')[1].split())
    found = re.search(r"Published, ImageNet-1k top-1[^:]*: ([\d.]+) fine-tuned", header)
    assert rows()[path.stem][5] == (found[1] if found else "none")


def test_common_has_no_function_that_no_experiment_uses():
    text = "".join(path.read_text() for path in (ROOT / "configs").glob("*.py"))
    functions = [
        name for name, value in vars(common).items()
        if getattr(value, "__module__", None) == common.__name__
    ]
    assert functions
    for name in functions:
        assert re.search(rf"(?<!def ){name}\(", text), name
