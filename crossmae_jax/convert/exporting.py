"""Writes weights as other libraries read them.

    timm          a folder: timm.create_model("local-dir:PATH", pretrained=True)
    huggingface   a folder: ViTMAEForPreTraining.from_pretrained(PATH), ViTModel or
                  ViTForImageClassification
    mae           a .pth file with the names of facebookresearch/mae or CrossMAE
    simmim        a .pth file with the names of microsoft/SimMIM's ViT or Swin
    safetensors   a .safetensors file with our names and a card
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossmae_jax.convert import (
    contents,
    folding,
    names,
    of_swin,
    opened,
    spellings,
    structure,
)
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files import safetensors_file, torch_file
from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.opened import Weights
from crossmae_jax.models import classifier

_TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}


def select(weights: Weights, format: str, parts: str) -> tuple[Weights, list[str]]:
    """Returns the weights that a format has a place for, and what that leaves out.

    Args:
      parts: "all", or "encoder" to leave the others out on purpose.

    Raises:
      ConversionError: if parts of a model would be left out unasked that the format
        could have held in a model of another kind: names them.
    """
    card = weights.card
    if parts not in ("all", "encoder"):
        raise ConversionError(f"Unknown parts {parts!r}. Known: all, encoder.")
    lines = []
    if format != "safetensors" and folding.has_cls_token_mlp(weights.tensors):
        weights = _with_plain_class_token(weights)
        card = weights.card
        lines.append("folded: the MLP of the class token, into that token")
    if parts == "encoder" and card.kind != "encoder":
        return opened.encoder_of(weights), lines
    check_encoder(card, format)
    if format == "timm" and card.encoder.windows and card.encoder.mask_tokens:
        return _without_mask_token(weights)
    if "aggregator" in card.parts and format in ("mae", "huggingface", "simmim"):
        raise ConversionError(
            f"The format {format} has no place for PR-MIM's aggregator, without which "
            "the decoder is another model; export the encoder with parts='encoder', or "
            "everything with format 'safetensors'."
        )
    if format == "huggingface" and card.model.get("pool", "cls") != "cls":
        raise ConversionError(
            "transformers' ViTForImageClassification classifies the normed class token,"
            f" this model has pool={card.model['pool']!r}; take format 'timm', or the "
            "encoder with parts='encoder'."
        )
    if card.kind == "pretrain" and (
        format == "timm"
        or format == "huggingface" and _left_over(format, weights)
    ):
        left_out = ", ".join(part for part in card.parts if part != "encoder")
        lines.append(f"left out: {left_out} ({format} has no place for them)")
        return opened.encoder_of(weights), lines
    if format != "safetensors" and card.target and (
        card.target["kind"] != "pixels"
    ):
        raise ConversionError(
            f"The decoder predicts {card.target['kind']}, which the format {format} "
            "would call pixels; export the encoder with parts='encoder', or everything "
            "with format 'safetensors'."
        )
    if card.model.get("head_norm") == "batch" and format != "safetensors":
        weights = folded(weights)
        lines.append("folded: the head's batch norm, into the head")
    if format != "safetensors" and (left_over := _left_over(format, weights)):
        raise ConversionError(
            f"The format {format} has no place for {', '.join(sorted(left_over))}, "
            "without which this is another model; export the encoder with "
            "parts='encoder', or everything with format 'safetensors'."
        )
    return weights, lines


def _without_mask_token(weights: Weights) -> tuple[Weights, list[str]]:
    """Returns a Swin by itself, of which timm has none with a mask token."""
    left_out = [part for part in weights.card.parts if part != "encoder"]
    if weights.card.kind != "encoder":
        weights = opened.encoder_of(weights)
    tensors = dict(weights.tensors)
    tensors.pop("encoder/mask_token", None)
    model = dict(weights.card.model)
    model["encoder"] = model["encoder"] | {"mask_tokens": False}
    card = dataclasses.replace(weights.card, model=model)
    left = ", ".join([*left_out, "the encoder's mask token"])
    return dataclasses.replace(weights, card=card, tensors=tensors), [
        f"left out: {left} (timm has no place for them)"
    ]


def check_encoder(card: Card, format: str) -> None:
    """Raises ConversionError if a format means another encoder by the same names."""
    encoder = card.encoder
    if encoder.windows:
        of_swin.check_format(card, format)
        return
    own = [
        f"{name}={value!r}" for name, value, usual in (
            ("qkv_bias", encoder.qkv_bias, "qkv"),
            ("relative_bias", encoder.relative_bias, "none"),
            ("layer_scale", encoder.layer_scale, None),
            ("mask_tokens", encoder.mask_tokens, False),
        ) if value != usual
    ]
    if encoder.positions == "none":  # fixed or trained, others have a table of them
        own.append("positions='none'")
    if format in ("timm", "huggingface", "mae") and own:
        raise ConversionError(
            f"The format {format} has no place for an encoder with {', '.join(own)}; "
            "take format 'simmim', whose names timm's Beit has, too, or 'safetensors'."
        )
    if format == "simmim" and encoder.qkv_bias == "qkv":
        raise ConversionError(
            "SimMIM's ViT has no bias of keys, this encoder has one; take another "
            "format."
        )
    if format == "simmim" and card.kind == "pretrain" and card.channels != 3:
        raise ConversionError(
            f"SimMIM's decoder predicts three channels, this one {card.channels}; "
            "export the encoder with parts='encoder', or take format 'safetensors'."
        )


def _table(format: str, card: Card) -> spellings.Table:
    """Returns the names that another library's format has for a model of this kind."""
    if table := of_swin.table_for(format, card):
        return table
    if format == "simmim":
        classifies = card.kind == "classifier"
        return spellings.SIMMIM_CLASSIFIER if classifies else spellings.SIMMIM
    if format == "huggingface":
        return {
            "pretrain": spellings.HUGGINGFACE_MAE, "encoder": spellings.HUGGINGFACE_VIT,
            "classifier": spellings.HUGGINGFACE_CLASSIFIER,
        }[card.kind]
    return {"mae": spellings.MAE, "timm": spellings.TIMM}[format]


def _left_over(format: str, weights: Weights) -> list[str]:
    """Returns the tensors for which a format has no names."""
    return spellings.to_theirs(
        _table(format, weights.card), weights.tensors,
        patch_size=of_swin.projected(weights.card),
    )[1]


def _with_plain_class_token(weights: Weights) -> Weights:
    """Returns weights whose class token is what an MLP made of it before."""
    card = weights.card
    encoder = card.model["encoder"] | {"cls_token_mlp": False}
    card = dataclasses.replace(card, model=card.model | {"encoder": encoder})
    tensors = folding.cls_token_mlp(weights.tensors)
    return dataclasses.replace(weights, card=card, tensors=tensors)


def folded(weights: Weights) -> Weights:
    """Returns a linear probe whose head does what its batch norm did before it."""
    model = weights.card.model | {"head_norm": "none"}
    card = dataclasses.replace(weights.card, model=model)
    tensors = folding.batch_norm(weights.tensors)
    return dataclasses.replace(weights, card=card, tensors=tensors)


def warnings(card: Card) -> list[str]:
    """Names what a reader of the exported encoder cannot see in it."""
    lines = []
    if card.kind == "encoder" and not card.fusion.final_norm:
        lines.append(
            "the encoder has no norm after its last block, as CrossMAE and MFF have "
            "none; pool the mean of the patch tokens"
        )
        last = card.fusion.used_maps[-1]
        if last < card.encoder.depth:
            lines.append(
                f"blocks from {last} on were not trained: no decoder block attended to "
                "them"
            )
    return lines


def write_safetensors(weights: Weights, path: Path) -> None:
    """Writes our own form: our names and layouts, and the card as metadata."""
    safetensors_file.write(
        path, weights.tensors, {opened.CARD: weights.card.to_json()}
    )


def write_mae(weights: Weights, path: Path) -> None:
    """Writes a .pth file that MAE's scripts load: the tensors under "model".

    Raises:
      ConversionError: if the scripts' CrossMAE would compute something else.
    """
    if names.attends_across(weights.tensors) and (
        weights.tensors["encoder/pos_embed"].read()[0].any()
    ):
        raise ConversionError(
            "The class token's row of the position table is not zero (it comes from "
            "weights that training started from); ours adds it, CrossMAE's scripts do "
            "not. Export the encoder with parts='encoder', or take 'safetensors'."
        )
    torch_file.write(path, {
        "model": _theirs(weights, "mae"), opened.EMBEDDED: weights.card.to_json(),
    })


def write_simmim(weights: Weights, path: Path) -> None:
    """Writes a .pth file that SimMIM's scripts load: the tensors under "model"."""
    torch_file.write(path, {
        "model": _theirs(weights, "simmim"), opened.EMBEDDED: weights.card.to_json(),
    })


def write_timm(weights: Weights, path: Path) -> None:
    """Writes the folder of a VisionTransformer."""
    path.mkdir()
    safetensors_file.write(
        path / contents.WEIGHTS, _theirs(weights, "timm"), _pytorch(weights.card)
    )
    _write_json(path / "config.json", timm_config(weights.card))


def write_huggingface(weights: Weights, path: Path, *, fresh_norm: bool) -> None:
    """Writes the folder of a ViTMAEForPreTraining; of a ViTModel for an encoder, of a
    ViTForImageClassification for a classifier.

    Args:
      fresh_norm: gives an encoder without a norm after its last block one of scale 1
        and bias 0, since a ViTModel has always one.
    """
    card = weights.card
    height, width = card.image_size
    full = card.kind == "pretrain"
    if full and card.normalize is None:
        raise ConversionError(
            "Whether the decoder predicts standardised patches is not known, and "
            "config.json must say it; import the weights with normalize=True or False, "
            "or export the encoder with parts='encoder'."
        )
    if full and height != width:
        raise ConversionError(
            f"ViTMAEForPreTraining takes square images only, this model {height} x "
            f"{width}; export the encoder with parts='encoder'."
        )
    tensors = dict(weights.tensors)
    if "encoder/norm/scale" not in tensors:
        if not fresh_norm:
            raise ConversionError(
                "A ViTModel ends in a norm, which this encoder has not (CrossMAE norms "
                "mixtures of feature maps, others pooled means). With fresh_norm it "
                "gets one of scale 1 and bias 0; hidden_states[-1] are then the tokens "
                "before it. timm needs none: format 'timm'."
            )
        tensors |= _fresh_norm(tensors["encoder/cls_token"])
    weights = dataclasses.replace(weights, tensors=tensors)
    theirs = _theirs(weights, "huggingface")
    path.mkdir()
    safetensors_file.write(path / contents.WEIGHTS, theirs, _pytorch(card))
    _write_json(path / "config.json", huggingface_config(card))
    if card.mean is not None and card.std is not None:
        _write_json(path / "preprocessor_config.json", {
            "image_processor_type": "ViTImageProcessor", "do_resize": True,
            "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
            "resample": 3, "size": {"height": height, "width": width},
            "image_mean": list(card.mean), "image_std": list(card.std),
        })


def _theirs(weights: Weights, format: str) -> Tensors:
    theirs, left_over = spellings.to_theirs(
        _table(format, weights.card), weights.tensors,
        patch_size=of_swin.projected(weights.card),
    )
    assert not left_over, f"`select` let through {left_over}"
    return theirs


def _pytorch(card: Card) -> dict[str, str]:
    # transformers asks which library the tensors are for.
    return {"format": "pt", opened.EMBEDDED: card.to_json()}


def _fresh_norm(cls_token: Tensor) -> dict[str, Tensor]:
    shape = cls_token.shape[-1:]

    def constant(value):
        return Tensor(
            shape, cls_token.dtype, lambda: cls_token.read().reshape(shape) * 0 + value
        )

    return {"encoder/norm/scale": constant(1), "encoder/norm/bias": constant(0)}


def timm_config(card: Card) -> dict[str, Any]:
    """Returns a config.json from which timm builds the model."""
    encoder, classifies = card.encoder, card.kind == "classifier"
    if encoder.windows:
        return of_swin.timm_config(card)
    size = encoder.title.removeprefix("ViT-").partition("/")[0]
    normed = (
        classifier.ends_in_norm(card.model["pool"]) if classifies
        else card.fusion.final_norm
    )
    num_classes = card.model["num_classes"] if classifies else 0
    pool = "token" if normed else "avg"
    height, width = card.image_size
    arguments = dict(
        global_pool=pool, img_size=[height, width], patch_size=encoder.patch_size,
        in_chans=card.channels, embed_dim=encoder.dim, depth=encoder.depth,
        num_heads=encoder.num_heads, mlp_ratio=encoder.mlp_ratio,
    )
    if not normed and not classifies:  # no norm at all, neither here nor there
        arguments |= dict(final_norm=False, fc_norm=False)
    # Of another size: any of timm's, for the arguments say all that differs.
    name, patches = _TIMM_SIZES.get(size, "tiny"), 14 if size == "H" else 16
    architecture = f"vit_{name}_patch{patches}_224"
    pretrained = dict(
        input_size=[card.channels, height, width], interpolation="bicubic",
        crop_pct=0.875, num_classes=num_classes, pool_size=None,
        first_conv="patch_embed.proj", classifier="head", fixed_input_size=True,
    )
    if card.mean is not None and card.std is not None:
        pretrained |= dict(mean=list(card.mean), std=list(card.std))
    names = {"label_names": list(card.classes)} if card.classes else {}
    return dict(
        architecture=architecture, num_classes=num_classes, num_features=encoder.dim,
        global_pool=pool, model_args=arguments, pretrained_cfg=pretrained, **names,
    )


def huggingface_config(card: Card) -> dict[str, Any]:
    """Returns a config.json from which transformers builds the model."""
    encoder, (height, width) = card.encoder, card.image_size
    config = dict(
        hidden_size=encoder.dim, num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.num_heads,
        intermediate_size=int(encoder.dim * encoder.mlp_ratio),
        hidden_act="gelu", qkv_bias=True, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        image_size=height if height == width else [height, width],
        patch_size=encoder.patch_size, num_channels=card.channels, dtype="float32",
    )
    if card.kind == "encoder":
        return dict(architectures=["ViTModel"], model_type="vit", **config)
    if card.kind == "classifier":
        labels = card.classes or [
            f"LABEL_{number}" for number in range(card.model["num_classes"])
        ]
        return dict(
            architectures=["ViTForImageClassification"], model_type="vit", **config,
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
        )
    decoder = structure.build(card).decoder
    known = {"norm_pix_loss": card.normalize}
    if card.masking is not None:
        known["mask_ratio"] = card.masking["mask_ratio"]
    return dict(
        architectures=["ViTMAEForPreTraining"], model_type="vit_mae", **config, **known,
        decoder_hidden_size=decoder.dim, decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=int(decoder.dim * decoder.mlp_ratio),
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


# Format: writer, and the suffix of its file; "" for a folder.
WRITERS: dict[str, tuple[Callable[..., None], str]] = {
    "timm": (write_timm, ""),
    "huggingface": (write_huggingface, ""),
    "mae": (write_mae, ".pth"),
    "simmim": (write_simmim, ".pth"),
    "safetensors": (write_safetensors, ".safetensors"),
}
