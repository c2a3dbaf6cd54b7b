"""What names and shapes do not tell of a model, from what lies beside the tensors.

In a checkpoint of MAE or CrossMAE these are the arguments of the training script, in a
folder of timm or transformers its `config.json`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.tensor import Tensors

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What names and shapes of tensors do not tell; None is not known.

    Attributes:
      num_heads: of the encoder; known without being told for the sizes Ti, S, B, L, H.
      decoder_heads: likewise for decoders of width 256 and 512.
      image_size: height and width; known without being told if patches form a square.
      mean: of each channel, for pixels in 0..1; likewise `std`.
      normalize: whether the decoder predicts standardised patches.
      mask_ratio: share of patches that was masked; `pred_ratio` that was predicted.
      fusion_maps: encoder blocks that the decoder's contexts are mixed of, () for all.
      fusion_input: whether the encoder's input is among them.
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

    def with_given(self, given: "Facts") -> "Facts":
        """Adds what the caller says to what the file says.

        Raises:
          ConversionError: if the two contradict each other.
        """
        for name, value in dataclasses.asdict(given).items():
            found = getattr(self, name)
            if None not in (found, value) and found != value:
                raise ConversionError(
                    f"{name}={value!r} was given, but the file says {found!r}; leave "
                    "it out."
                )
        return dataclasses.replace(self, **{
            name: value for name, value in dataclasses.asdict(given).items()
            if value is not None
        })


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds no JSON object.")
    return values


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
    found: dict[str, Any] = {"num_heads": config.get("num_attention_heads")}
    if (epsilon := config.get("layer_norm_eps", 1e-12)) != 1e-6:
        evidence.append(
            f"config.json has layer_norm_eps {epsilon}; MAE was trained with 1e-6, "
            "which is used here"
        )
    for name in ("hidden_act", "qkv_bias"):
        usual = {"hidden_act": "gelu", "qkv_bias": True}[name]
        if config.get(name, usual) != usual:
            raise ConversionError(
                f"{path}: {name} is {config[name]!r}, but here it is always {usual!r}."
            )
    if "decoder_num_attention_heads" in config:
        found |= {
            "decoder_heads": config["decoder_num_attention_heads"],
            "normalize": config.get("norm_pix_loss"),
            "mask_ratio": config.get("mask_ratio"),
        }
    size = config.get("image_size")
    if size is not None:
        found["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    evidence.append("heads, image size and target: from config.json")
    if (path / "preprocessor_config.json").is_file():
        processor = read_json(path / "preprocessor_config.json")
        found |= {
            "mean": tuple(processor["image_mean"]), "std": tuple(processor["image_std"])
        }
        evidence.append("mean and std: from preprocessor_config.json")
    return Facts(**found)


def of_timm(config: dict[str, Any], evidence: list[str]) -> Facts:
    """Returns what a folder of timm tells; `config` is empty for a file."""
    cfg = config.get("pretrained_cfg", config)
    if not {"mean", "std"} <= cfg.keys():
        evidence.append("mean and std: not in the file")
        return Facts(num_heads=config.get("model_args", {}).get("num_heads"))
    evidence.append("mean and std: from config.json")
    return Facts(
        num_heads=config.get("model_args", {}).get("num_heads"),
        mean=tuple(cfg["mean"]), std=tuple(cfg["std"]),
    )


def of_mae(
    tensors: Tensors, rest: dict[str, Any], evidence: list[str]
) -> Facts:
    """Returns what a checkpoint of MAE or CrossMAE tells by its arguments."""
    args = rest.get("args") or {}
    found: dict[str, Any] = {}
    patch = tensors.get("patch_embed.proj.weight")
    if patch is not None and patch.shape[1:2] == (3,):
        found = dict(zip(("mean", "std"), _IMAGENET, strict=True))
        evidence.append("mean and std: ImageNet's, written into the reference's code")
    if "mask_token" in tensors and args:
        found |= {
            "normalize": args.get("norm_pix_loss"),
            "mask_ratio": args.get("mask_ratio"),
            "pred_ratio": args.get("kept_mask_ratio"),
            "fusion_input": args.get("use_input"),
        }
        if (blocks := args.get("use_fm")) is not None:
            # The reference's [-1] stands for all blocks, not for the last one.
            found["fusion_maps"] = () if list(blocks) == [-1] else tuple(blocks)
        evidence.append("masking, target and fusion: from the arguments in the file")
    return Facts(**found)


def recipe(rest: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint's arguments say of how it was trained."""
    args = rest.get("args") or {}
    kept = (
        "epochs", "batch_size", "accum_iter", "blr", "weight_decay", "warmup_epochs"
    )
    found = {name: args[name] for name in kept if args.get(name) is not None}
    if isinstance(rest.get("epoch"), int):
        found["epoch"] = rest["epoch"]
    return found
