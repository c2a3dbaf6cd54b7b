"""Settings that older versions wrote, in the form of this one.

Two things happen to settings as the library grows. Some are added: a run from before
did then what `_BEFORE` and `_BEFORE_OF_PRETRAINING` say. And some move: the model's lay
side by side once (`model.decoder_dim`) and are grouped by its parts now
(`model.decoder.dim`). Whoever reads a stored configuration reads it through
`completed`; files of experiments go through `of_file`, since people keep their own.

The kinds that are named here are those that there were when settings lay side by side.
"""

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from crossmae_jax.data import decoding

# What settings are called now. One that is two now goes to those whose group there is.
RENAMED: dict[str, tuple[str, ...]] = {
    "model.size": ("model.encoder.size",),
    "model.mlp_ratio": ("model.encoder.mlp_ratio", "model.decoder.mlp_ratio"),
    "model.drop_path": ("model.encoder.drop_path",),
    "model.fusion": ("model.fusion.kind",),
    "model.fusion_maps": ("model.fusion.maps",),
    "model.fusion_input": ("model.fusion.input",),
    "model.decoder": ("model.decoder.kind",),
    "model.decoder_dim": ("model.decoder.dim",),
    "model.decoder_depth": ("model.decoder.depth",),
    "model.decoder_heads": ("model.decoder.num_heads",),
    "model.decoder_self_attention": ("model.decoder.self_attention",),
}

# Options beside a kind that did not look at them, and the value that says nothing.
_IGNORED = {
    ("fusion", "last"): {"maps": None, "input": True},
    ("aggregator", "transformer"): {"kernel_size": 7},
}

# Settings that are younger than some runs, with what those runs did: of any objective,
_BEFORE = {
    "checkpoint.keep_every_epochs": 0.0,
    "data.interpolation": "bicubic",
    "data.max_pixels": decoding.MAX_PIXELS,
    "data.max_skipped_share": 1.0,
    "data.transform": "classification",
    "data.weights_grid": None,
    "log_norms": False,
    "mesh.fsdp": 0,
    "model.encoder.drop_path": 0.0,
    "model.encoder.mask_tokens": False,
    "model.encoder.weight_init": "xavier",
    "optim.base_batch": 256,
    "optim.drop_epochs": [],
    "optim.drop_factor": 0.1,
    "optim.max_skipped_in_a_row": 5,
    "optim.schedule": "cosine",
    "optim.trust_coefficient": 0.001,
    "optim.warmup_lr": 0.0,
    "watchdog_minutes": 0.0,
}
# of a ViT, which was the only encoder then,
_BEFORE_OF_VIT = {
    "model.encoder.cls_token_mlp": False,
    "model.encoder.layer_scale": None,
    "model.encoder.positions": "sincos",
    "model.encoder.qkv_bias": "qkv",
    "model.encoder.relative_bias": "none",
}
# and of pre-training, which there was first.
_BEFORE_OF_PRETRAINING = {
    "attention_maps.before": dict(mask_ratio=0.75, pred_ratio=0.75, throw_ratio=0.0),
    "attention_maps.every_epochs": 0.0,
    "checkpoint.best": "",
    "data.crop": "ten_tries",
    "data.eval_crop_ratio": 0.875,
    "data.randaug_magnitude": 9.0,
    "data.randaug_ops": 0,
    "init_channels": "",
    "init_from": "",
    "loss.kind": "mse",
    "loss.thrown_weight": 1.0,
    "loss.weights": {},
    "masking.noise": "uniform",
    "masking.retain": "random",
    "masking.rounding": "floor",
    "masking.throw_ratio": 0.0,
    "masking.together": 1,
    "masking.unit": 1,
    "model.aggregator.kernel_size": 7,
    "model.aggregator.kind": "none",
    "model.aggregator.rewrites_retained": False,
    "model.remat": "none",
    "optim.decay_tokens": True,
    "optim.layer_decay": 1.0,
    "optim.name": "adamw",
    "target.kind": "pixels",
}

# Settings that may be unset, and their types, which JSON does not tell of nothing.
_OPTIONAL = {
    "data.data_dir": str,
    "data.dir": str,
    "data.eval_dir": str,
    "data.num_classes": int,
    "data.weights_grid": tuple,
    "model.encoder.layer_scale": float,
    "model.fusion.maps": tuple,
    "target.encoder.layer_scale": float,
    "optim.clip_norm": float,
    "tune_blocks": float,
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns stored settings with the names of this version, and all that it has.

    Args:
      config: of a run, as JSON has it.
    """
    config, _ = grouped(config)
    before = dict(_BEFORE)
    if config.get("model", {}).get("encoder", {}).get("kind", "vit") == "vit":
        before |= _BEFORE_OF_VIT
    if config.get("objective", "pretrain") == "pretrain":
        decoder = config.get("model", {}).get("decoder", {}).get("kind")
        visible = "decoder" if decoder == "mae" else "encoder"
        thrown = "unit" if config.get("masking", {}).get("unit", 1) > 1 else "patch"
        before |= _BEFORE_OF_PRETRAINING | {
            "model.aggregator.visible": visible, "masking.throw_by": thrown,
        }
    for name, value in before.items():
        *parents, key = name.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node.setdefault(key, copy.deepcopy(value))
    return config


def grouped(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns settings grouped by the parts of the model, and what had to be moved.

    Returns:
      A copy of the settings, and their old names where they had any.
    """
    config = copy.deepcopy(dict(config))
    model = config.get("model", {})
    old = {
        name: model.pop(_key(name)) for name in RENAMED
        if _key(name) in model and not isinstance(model[_key(name)], Mapping)
    }
    # Those with one successor first: they decide which groups there are.
    for name in sorted(old, key=lambda name: len(RENAMED[name])):
        for new in RENAMED[name]:
            _, part, option = new.split(".")
            if len(RENAMED[name]) == 1 or part in model:
                model.setdefault(part, {})[option] = old[name]
    if old:
        model["encoder"] = {"kind": "vit"} | model.get("encoder", {})
        for (part, kind), options in _IGNORED.items():
            if model.get(part, {}).get("kind") == kind:
                model[part].update(options)
    return config, list(old)


def _key(name: str) -> str:
    return name.removeprefix("model.")


def of_file(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Returns the settings of an experiment's file, grouped, and the old names in it.

    Those of a file that has none are returned as they are.
    """
    values, old = grouped(config.to_dict(preserve_field_references=True))
    return (ConfigDict(as_written(values)) if old else config), old


def moved(name: str, config: ConfigDict) -> str:
    """Says what a setting is called now; "" of a name that is no old one.

    Args:
      name: without "config.", such as "model.decoder_dim".
      config: to which it was to belong.
    """
    groups = config.get("model", {})
    new = [
        successor for successor in RENAMED.get(name, ())
        if successor.split(".")[1] in groups
    ]
    return f"{name} is now {' and '.join(new)}" if new else ""


def as_written(values: Any, path: str = "") -> Any:
    """Returns settings as configs write them: JSON has no tuples, no placeholders."""
    if isinstance(values, dict):
        return {
            name: as_written(value, f"{path}.{name}" if path else name)
            for name, value in values.items()
        }
    if values is None and path in _OPTIONAL:
        return placeholder(_OPTIONAL[path])
    return tuple(map(as_written, values)) if isinstance(values, list) else values
