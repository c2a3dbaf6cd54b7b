"""What names and shapes do not tell of a model, from what lies beside the tensors.

In a checkpoint of MAE or CrossMAE these are the arguments of the training script, in a
folder of timm or transformers its `config.json`.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from crossmae_jax import augment
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.runs import records

# Of our norms. A smaller one, as transformers' own 1e-12, differs in rounding only.
EPSILON = 1e-6
# timm's words for what classifiers pool, and ours.
_POOLS = {"token": "cls", "avg": "mean"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Arguments of timm's VisionTransformer that our models have as well.
_TIMM_ARGUMENTS = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim",
    "depth", "num_heads", "mlp_ratio", "final_norm", "fc_norm",
    "init_values", "no_embed_class",  # see `folding`
    "depths", "window_size",  # of a Swin, whose tensors tell the same
    # In training only.
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "weight_init",
}
# Those that our models have at this value.
_TIMM_USUAL = {
    "qkv_bias": True, "class_token": True, "act_layer": "gelu", "pre_norm": False,
    "qk_norm": False, "reg_tokens": 0, "pos_embed": "learn",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What names and shapes of tensors do not tell; None is not known.

    Attributes:
      num_heads: of the encoder; assumed without being told for the sizes Ti, S, B, L,
        H.
      decoder_heads: likewise for decoders of width 256 and 512.
      image_size: height and width; assumed without being told if patches may form a
        square.
      mean: of each channel, for pixels in 0..1; likewise `std`.
      normalize: whether the decoder predicts standardised patches.
      mask_ratio: share of patches that was masked; `pred_ratio` that was predicted.
      fusion_maps: encoder blocks that the decoder's contexts are mixed of, () for all.
      fusion_input: whether the encoder's input is among them.
      classes: what the logits stand for, in their order.
      pool: of a classifier: "cls" for the normed class token, "mean" for the mean of
        the patch tokens with a norm after it; a file may have others.
    """

    num_heads: int | None = None
    decoder_heads: int | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalize: bool | None = None
    mask_ratio: float | None = None
    pred_ratio: float | None = None
    fusion_maps: tuple[int, ...] | None = None
    fusion_input: bool | None = None
    classes: tuple[str, ...] | None = None
    pool: str | None = None

    def __post_init__(self):
        size = self.image_size
        if size is not None and (
            not isinstance(size, tuple) or len(size) != 2 or min(size) < 1
        ):
            raise ConversionError(
                f"image_size={size!r}; expected a height and a width in pixels, such "
                "as (224, 224)."
            )
        for name in ("num_heads", "decoder_heads"):
            heads = getattr(self, name)
            if heads is not None and heads < 1:
                raise ConversionError(f"{name}={heads}; expected 1 or more.")
        for name in ("mask_ratio", "pred_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio < 1:
                raise ConversionError(
                    f"{name}={ratio}; expected a share above 0 and below 1."
                )
        names = self.classes
        if names is not None and (
            not isinstance(names, tuple) or len(set(names)) < len(names)
        ):
            raise ConversionError(
                f"classes={str(names)[:200]}; expected a tuple of names, each once."
            )

    def with_given(self, given: "Facts") -> "Facts":
        """Adds what the caller says to what the file says.

        Raises:
          ConversionError: if the two contradict each other.
        """
        for name, value in dataclasses.asdict(given).items():
            in_file = getattr(self, name)
            if None not in (in_file, value) and in_file != value:
                raise ConversionError(
                    f"{name}={value!r} was given, but the file says {in_file!r}; leave "
                    "it out."
                )
        return dataclasses.replace(self, **{
            name: value for name, value in dataclasses.asdict(given).items()
            if value is not None
        })


def usable(facts: Any, *instead: Facts, where: str = "") -> Any:
    """Returns facts or a card, with the mean and std of `instead` if theirs cannot be.

    Args:
      instead: the first that has both is taken.
      where: what states them.

    Raises:
      ConversionError: if they cannot be and there are no others.
    """
    try:
        augment.check_statistics(mean=facts.mean, std=facts.std)
    except (ArithmeticError, TypeError, ValueError) as error:  # files have any value
        for other in instead:
            if None not in (other.mean, other.std):
                return dataclasses.replace(facts, mean=other.mean, std=other.std)
        raise ConversionError(f"{where}: {error}" if where else str(error)) from error
    return facts


def check_classes(classes: tuple[str, ...] | None, number: int | None) -> str:
    """Says that there is another number of names than a head has classes; "" if not.

    Args:
      number: of the head's classes; None if it has none, or it is not known.
    """
    if classes is None or number is None or len(classes) == number:
        return ""
    return f"there are {len(classes)} names of classes, but the head has {number}"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        return records.parse(path.read_bytes())
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON: {error}.") from error


def of_huggingface(
    path: Path, config: dict[str, Any], evidence: list[str]
) -> Facts:
    """Returns what a folder of transformers tells.

    Raises:
      ConversionError: if the model has settings that ours has not.
    """
    if not config:
        raise ConversionError(
            f"{path} is a bare file of transformers; give the folder with its "
            "config.json."
        )
    facts: dict[str, Any] = {
        "num_heads": config.get("num_attention_heads", 12)  # transformers' default
    }
    if (epsilon := config.get("layer_norm_eps", 1e-12)) != EPSILON:
        evidence.append(
            f"config.json has layer_norm_eps {epsilon}; MAE was trained with 1e-6, "
            "which is used here"
        )
    wrong = {"layer_norm_eps": (epsilon, "at most 1e-06")} if epsilon > EPSILON else {}
    for name, usual in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config.get(name, usual) != usual:
            wrong[name] = config[name], repr(usual)
    for name, (value, usual) in wrong.items():
        raise ConversionError(
            f"{path}: {name} is {value!r}, but here it is always {usual}, with which "
            "these weights would be another model. Train on from them in transformers "
            f"with {name} changed to that, and convert the result."
        )
    if "ViTForImageClassification" in (config.get("architectures") or ()):
        facts |= {"pool": "cls", "classes": _labels(config, evidence)}
    if "decoder_num_attention_heads" in config:
        facts |= {
            "decoder_heads": config["decoder_num_attention_heads"],
            "normalize": config.get("norm_pix_loss"),
            **_shares({"mask_ratio": config.get("mask_ratio")}, evidence),
        }
    size = config.get("image_size")
    if size is not None:
        facts["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    evidence.append("heads, image size and target: from config.json")
    if (path / "preprocessor_config.json").is_file():
        processor = read_json(path / "preprocessor_config.json")
        facts |= _statistics(processor, config.get("num_channels", 3), evidence)
    return Facts(**facts)


def _shares(ratios: dict[str, Any], evidence: list[str]) -> dict[str, float]:
    """Returns the ratios that a model can have been trained with.

    Others are written for encoders, of which they say nothing: 0.0 to mask nothing.
    """
    for name, ratio in ratios.items():
        if ratio is not None and not 0 < ratio < 1:
            evidence.append(f"{name} {ratio}, beside the tensors: not of its training")
    return {
        name: ratio for name, ratio in ratios.items()
        if ratio is not None and 0 < ratio < 1
    }


def _statistics(
    processor: dict[str, Any], channels: int, evidence: list[str]
) -> dict[str, Any]:
    """Returns the mean and std that a preprocessor_config.json tells, if it does."""
    source = "preprocessor_config.json"
    factor = processor.get("rescale_factor", 1 / 255)
    if processor.get("do_rescale", True) and abs(255 * factor - 1) > 0.01:
        evidence.append(
            f"mean and std: not known, for {source} has rescale_factor {factor}, "
            "which does not bring pixels to 0..1"
        )
        return {}
    if processor.get("do_normalize") is False:
        evidence.append(f"mean and std: 0 and 1, for {source} has do_normalize false")
        return {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    if not {"image_mean", "image_std"} <= processor.keys():
        return {}
    evidence.append(f"mean and std: from {source}")
    values = {"mean": processor["image_mean"], "std": processor["image_std"]}
    return {
        name: tuple(x) if isinstance(x, list) else (x,) * channels
        for name, x in values.items()
    }


def of_timm(config: dict[str, Any], evidence: list[str]) -> Facts:
    """Returns what a folder of timm tells; `config` is empty for a file.

    Raises:
      ConversionError: if the model has settings that ours has not.
    """
    arguments, cfg = config.get("model_args", {}), config.get("pretrained_cfg", config)
    if others := sorted(
        name for name, value in arguments.items() if name not in _TIMM_ARGUMENTS
        and value not in (None, _TIMM_USUAL.get(name))
    ):
        raise ConversionError(
            "config.json has model_args that change a ViT into another than ours: "
            + ", ".join(f"{name}={arguments[name]!r}" for name in others)
            + ". What these weights compute cannot be had here, nor their encoder "
            "alone; take those of a plain VisionTransformer."
        )
    pool = arguments.get("global_pool", config.get("global_pool"))
    facts: dict[str, Any] = {"pool": _POOLS.get(pool, pool)}
    if "depths" not in arguments:  # else a list, of stages
        facts["num_heads"] = arguments.get("num_heads")
    size = arguments.get("img_size", (cfg.get("input_size") or (None,))[1:])
    if size:
        facts["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if {"mean", "std"} <= cfg.keys():
        facts |= {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}
        evidence.append("image size, mean and std: from config.json")
    else:
        evidence.append("mean and std: not in the file")
    facts["classes"] = _names(
        config.get("label_names", cfg.get("label_names")), evidence
    )
    return Facts(**facts)


def _names(by_number: Any, evidence: list[str]) -> tuple[str, ...] | None:
    """Returns names in the order of their numbers, as timm and transformers list them.

    Names that occur several times get their number. None if there are none, or some
    numbers have none.
    """
    if isinstance(by_number, dict):
        numbered = {str(number): name for number, name in by_number.items()}
        by_number = [numbered.get(str(i)) for i in range(len(numbered))]
    if not by_number or not all(isinstance(name, str) for name in by_number):
        return None
    counts = collections.Counter(by_number)
    if twice := [name for name, count in counts.items() if count > 1]:
        evidence.append(
            f"several classes are called {', '.join(twice)}; here with their numbers"
        )
    return tuple(
        f"{name} ({number})" if counts[name] > 1 else name
        for number, name in enumerate(by_number)
    )


def _labels(config: dict[str, Any], evidence: list[str]) -> tuple[str, ...] | None:
    """Returns the classes of a classifier of transformers, if somebody named them."""
    labels = _names(config.get("id2label"), evidence)
    unnamed = labels and all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return None if unnamed else labels


def of_mae(rest: dict[str, Any], evidence: list[str]) -> Facts:
    """Returns what a checkpoint of MAE or CrossMAE tells by its arguments."""
    args = _arguments(rest)
    facts: dict[str, Any] = {
        ours: args[theirs] for ours, theirs, kind in (
            ("normalize", "norm_pix_loss", bool), ("fusion_input", "use_input", bool),
        ) if isinstance(args.get(theirs), kind)
    }
    facts |= _shares({
        ours: args[theirs] for ours, theirs in (
            ("mask_ratio", "mask_ratio"), ("pred_ratio", "kept_mask_ratio")
        ) if isinstance(args.get(theirs), float)
    }, evidence)
    blocks = args.get("use_fm")
    if isinstance(blocks, list) and all(isinstance(block, int) for block in blocks):
        # The reference's [-1] stands for all blocks, not for the last one.
        facts["fusion_maps"] = () if blocks == [-1] else tuple(blocks)
    if facts:
        evidence.append("masking, target and fusion: from the arguments in the file")
    if isinstance(args.get("global_pool"), bool):  # of the scripts for fine-tuning
        facts["pool"] = "mean" if args["global_pool"] else "cls"
    return Facts(**facts)


def _arguments(rest: dict[str, Any]) -> dict[str, Any]:
    """Returns the training script's arguments, if there are any."""
    args = rest.get("args")
    return args if isinstance(args, dict) else {}


def recipe(rest: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint's arguments say of how it was trained."""
    args = _arguments(rest)
    kept = (
        "epochs", "batch_size", "accum_iter", "blr", "weight_decay", "warmup_epochs"
    )
    # Numbers only: a file may hold anything, of any size.
    values = {name: args[name] for name in kept if type(args.get(name)) in (int, float)}
    if isinstance(rest.get("epoch"), int):
        values["epoch"] = rest["epoch"]
    return values
