"""From a card to the model it describes, and from bare tensors to a card.

A file of PyTorch weights tells most of a model by its names and shapes: width, depth,
patches, the kind of decoder. What it does not tell is looked for in what lies beside
the tensors (the arguments of the training script, a `config.json`), then in what the
caller says. If it is in none of them, what is usual is assumed where there is something
usual, and the card says so (`Card.assumed`); else that is an error.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crossmae_jax import kinds
from crossmae_jax.convert import encoder_structure, names
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensors
from crossmae_jax.convert.hints import Facts
from crossmae_jax.convert.names import ConversionError, Untold
from crossmae_jax.models import classifier, encoders, mim, vit
from crossmae_jax.objectives import objective, pretrain
from crossmae_jax.runs import settings

# Heads of every published decoder by its width: ViT-S has 256, the others 512.
_DECODER_HEADS = {256: 8, 512: 16}


def flags_of_heads(config: ConfigDict) -> str:
    """Returns what an import of the weights of a model has to be told of its heads.

    Nothing where width and depth are published, since heads are then known.
    """
    encoder, flags = encoders.build_encoder(config), []
    if (encoder.dim, encoder.depth) not in {size[:2] for size in vit.SIZES.values()}:
        flags.append(f"--num_heads={encoder.num_heads}")
    decoder = config.model.get("decoder", {})
    if "num_heads" in decoder and decoder["dim"] not in _DECODER_HEADS:
        flags.append(f"--decoder_heads={decoder['num_heads']}")
    return " ".join(flags)


def config_of(card: Card) -> ConfigDict:
    """Returns the settings from which the card's model is built, in float32.

    What the card does not know is filled in with values that no tensor depends on.
    """
    model = dict(card.model)
    num_classes = model.pop("num_classes", None)
    config = dict(
        model=model | dict(remat="none", dtype="float32"),
        masking=card.masking or dict(mask_ratio=0.75, pred_ratio=0.75),
        target=card.target or dict(normalize=card.normalize in (True, None)),
        data=dict(
            image_size=card.image_size, channels=card.channels,
            mean=card.mean or (0.0,) * card.channels,
            std=card.std or (1.0,) * card.channels,
            num_classes=num_classes,
        ),
    )
    if card.kind == "pretrain":  # whose card may be older than some settings
        config = settings.completed(config)
    return ConfigDict(settings.as_written(config))  # JSON has no tuples


def build(card: Card) -> Any:
    """Returns the model of a card: a masked image model, a ViT or a classifier."""
    config = config_of(card)
    if card.kind == "pretrain":
        return mim.build(config)
    if card.kind == "encoder":
        return encoders.build_encoder(config, final_norm=card.fusion.final_norm)
    return classifier.build(config)


def abstract_variables(card: Card) -> Any:
    """Returns shapes and types of the variables of the card's model.

    Those of a masked image model and of a classifier have a level per part; so has that
    of an encoder by itself: {"params": {"encoder": ...}}. A teacher's, which only
    training needs, are not among them.

    Raises:
      ConversionError: if the card contradicts itself.
    """
    key = jax.random.key(0)
    images = jax.ShapeDtypeStruct((1, *card.image_size, card.channels), jnp.float32)
    try:
        if card.kind == "pretrain":
            return kept(card, jax.eval_shape(
                pretrain.Pretrain(config_of(card)).init, key
            ))
        variables = jax.eval_shape(build(card).init, key, images)
    except ValueError as error:
        raise ConversionError(f"{card.origin}: {error}") from error
    if card.kind == "classifier":
        return variables
    return {collection: {"encoder": tree} for collection, tree in variables.items()}


def kept(card: Card, variables: Any) -> Any:
    """Returns variables of the card's model without what only training needs."""
    if card.kind != "pretrain":
        return variables
    return objective.kept(variables, pretrain.Pretrain(config_of(card)).starts)


def infer(
    tensors: Tensors, patch: tuple[int, ...], facts: Facts, *, fallback: Facts,
    origin: str, recipe: dict[str, Any], evidence: list[str], assumed: dict[str, str],
) -> Card:
    """Returns the card of bare tensors.

    Args:
      tensors: under our names and in our layouts.
      patch: the patch projection's shape in PyTorch, out x c x p x p, which ours hides.
      fallback: used where neither the facts nor published sizes tell.
      evidence: what was concluded from what is added to it.
      assumed: likewise what is assumed, see `Card.assumed`.

    Raises:
      ConversionError: if a fact is missing, or the tensors are of no model of ours.
    """
    encoder, image_size = encoder_structure.settings(
        tensors, patch, facts, fallback, evidence, assumed
    )
    model: dict[str, Any] = {"encoder": encoder}
    made = kinds.make(
        "model.encoder", encoders.ENCODERS, encoder, image_size=image_size,
        channels=patch[1],
    )
    channels, kind, masking, classes = patch[1], "encoder", None, None
    _check_statistics(facts, channels)
    if any(name.startswith("decoder/") for name in tensors):
        kind, depth = "pretrain", encoder_structure.depth_of(tensors, "encoder/blocks_")
        model |= _decoder_settings(tensors, depth, facts, fallback, evidence, assumed)
        masking = _masking_settings(tensors, facts)
        if encoder.get("mask_tokens"):
            masking = _masking_of_simmim(made.patch_size, image_size, facts, assumed)
        if facts.normalize is None:
            evidence.append("targets: the file does not say whether standardised")
    elif "head/bias" in tensors or "fc_norm/scale" in tensors:
        kind = "classifier"
        model |= _head_settings(tensors, facts, evidence, assumed, made.has_cls)
        classes = facts.classes
        evidence.append("names of the classes: " + (
            f"{classes[0]}, ..." if classes else "not known"
        ))
    else:
        has_norm = "encoder/norm/scale" in tensors
        model["fusion"] = {"kind": "last" if has_norm else "inter_block"}
        evidence.append(
            "no decoder, no head; " + ("with" if has_norm else "without") +
            " a norm after the last block"
        )
    evidence += [f"assumed: {line}" for line in assumed.values()]
    return Card(
        kind=kind, model=model, image_size=image_size, channels=channels,
        mean=facts.mean, std=facts.std, normalize=facts.normalize, masking=masking,
        recipe=recipe, step=None, origin=origin, classes=classes, assumed=assumed,
    )


def _check_statistics(facts: Facts, channels: int) -> None:
    for name in ("mean", "std"):
        values = getattr(facts, name)
        if values is not None and len(values) != channels:
            raise ConversionError(
                f"{name}={values} has {len(values)} values, but the file is for "
                f"{channels} channels."
            )


def _masking_settings(tensors: Tensors, facts: Facts) -> dict[str, Any] | None:
    """Returns `config.masking`; None if nobody told the ratios."""
    asks = names.attends_across(tensors)
    # MAE predicts all that is masked.
    pred = facts.pred_ratio if asks else facts.mask_ratio
    if (facts.mask_ratio is None) != (pred is None):
        raise ConversionError(
            f"mask_ratio={facts.mask_ratio} and pred_ratio={pred}: give both, or "
            "none of them."
        )
    if facts.mask_ratio is None:
        return None
    return dict(
        mask_ratio=facts.mask_ratio, pred_ratio=pred, throw_ratio=0.0, retain="random"
    )


def _masking_of_simmim(
    patch_size: int, image_size: tuple[int, int], facts: Facts, assumed: dict[str, str]
) -> dict[str, Any]:
    """Returns `config.masking` of SimMIM, whose files do not tell it."""
    grid = [length // patch_size for length in image_size]
    unit = max(32 // patch_size, 1)
    if any(side % unit or side == unit for side in grid):
        unit = 1
    assumed["unit"] = f"masked in squares of {unit * patch_size} pixels"
    ratio = facts.mask_ratio
    if ratio is None:
        ratio = 0.6
        assumed["mask_ratio"] = (
            "60 % masked, as SimMIM's code has; give mask_ratio if not"
        )
    return dict(
        mask_ratio=ratio, pred_ratio=ratio, throw_ratio=0.0, retain="random", unit=unit
    )


def _head_settings(
    tensors: Tensors, facts: Facts, evidence: list[str], assumed: dict[str, str],
    has_cls: bool,
) -> dict[str, Any]:
    """Returns a classifier's pooling and number of classes, 0 without a head.

    Raises:
      ConversionError: for a pooling that ours cannot do with the norms that there are.
    """
    head, has_norm = tensors.get("head/bias"), "fc_norm/scale" in tensors
    num_classes = head.shape[0] if head else 0
    if not has_cls:
        evidence.append(f"classifier: {num_classes} classes from the mean of tokens")
        return {"pool": "normed_mean", "num_classes": num_classes}
    usual = "mean" if has_norm else "cls"
    title = {"mean": "the mean of patch tokens", "cls": "the class token"}[usual]
    norm = "with an fc_norm" if has_norm else "without an fc_norm"
    if facts.pool not in (None, usual):
        raise Untold(
            f"This classifier pools by {facts.pool!r}, {norm}. Known are 'cls', the "
            "class token after the encoder's norm, and 'mean', the mean of patch "
            "tokens before an fc_norm. To take the encoder by itself: "
            "parts='encoder', or --parts=encoder.", flags="--parts=encoder",
        )
    if facts.pool is None:
        assumed["pool"] = f"{title} is pooled, as usual {norm}; if not: parts=encoder"
    evidence.append(f"classifier: {num_classes} classes from {title}, {norm}")
    return {"pool": usual, "num_classes": num_classes}


def _decoder_settings(
    tensors: Tensors, depth: int, facts: Facts, fallback: Facts, evidence: list[str],
    assumed: dict[str, str],
) -> dict[str, Any]:
    if "encoder/mask_token" in tensors and "decoder/decoder_pred/bias" in tensors:
        evidence.append("decoder: one layer, as SimMIM's")
        return dict(
            fusion=dict(kind="last"), decoder=dict(kind="linear", norm=False),
            aggregator=dict(
                kind="none", kernel_size=7, rewrites_retained=False, visible="decoder"
            ),
        )
    if "decoder/mask_token" not in tensors or not tensors["decoder/mask_token"].shape:
        raise ConversionError("The file has parts of a decoder, but no mask token.")
    dim = tensors["decoder/mask_token"].shape[-1]
    decoder_depth = encoder_structure.depth_of(tensors, "decoder/decoder_blocks_")
    heads = facts.decoder_heads
    if heads is None:
        heads = _DECODER_HEADS.get(dim, fallback.decoder_heads)
        published = f", as in every published one of width {dim}; give decoder_heads "
        assumed["decoder_heads"] = f"{heads} heads of the decoder" + (
            f"{published}if not" if dim in _DECODER_HEADS else ""
        )
    if heads is None:
        raise Untold(
            f"The decoder's width {dim} is no published one, so that its number of "
            "heads cannot be told from the tensors; give decoder_heads.",
            flags="--decoder_heads=N",
        )
    first, crosses = "decoder/decoder_blocks_0", names.attends_across(tensors)
    mixes = "fusion/kernel" in tensors
    attends = f"{first}/self_attn/qkv/bias" in tensors
    evidence.append(
        f"decoder: {'cross' if crosses else 'self'}-attention"
        f"{' and self-attention' if attends else ''}, width {dim}, depth "
        f"{decoder_depth}, {heads} heads"
    )
    maps, with_input = None, True
    if mixes:
        maps, with_input = _fusion(tensors["fusion/kernel"].shape[0], depth, facts)
        evidence.append(
            f"fusion: {tensors['fusion/kernel'].shape[0]} feature maps, "
            + ("all blocks" if maps is None else f"blocks {maps}")
            + (" and the encoder's input" if with_input else "")
        )
    return dict(
        fusion=dict(
            kind="inter_block" if mixes else "last", maps=maps, input=with_input
        ),
        decoder=dict(
            kind="cross" if crosses else "mae", dim=dim, depth=decoder_depth,
            num_heads=heads, self_attention=attends,
            mlp_ratio=encoder_structure.mlp_ratio_of(tensors, first, dim),
        ),
        aggregator=dict(
            kind="none", kernel_size=7, rewrites_retained=False,
            visible="encoder" if crosses else "decoder",
        ),
    )


def _fusion(
    num_maps: int, depth: int, facts: Facts
) -> tuple[tuple[int, ...] | None, bool]:
    """Returns which maps are mixed: blocks (None for all), and whether the input."""
    if facts.fusion_maps is None and facts.fusion_input is not False and (
        num_maps == depth + 1
    ):
        return None, True
    if facts.fusion_maps is None or facts.fusion_input is None:
        raise Untold(
            f"The decoder mixes {num_maps} feature maps of an encoder of depth "
            f"{depth}; the tensors do not tell which; give fusion_maps (the blocks, "
            "all of them if empty) and fusion_input.",
            flags="--fusion_maps=BLOCKS --fusion_input=true",
        )
    blocks = facts.fusion_maps or tuple(range(depth))
    if len(blocks) + facts.fusion_input != num_maps:
        raise ConversionError(
            f"fusion_maps={facts.fusion_maps} with fusion_input={facts.fusion_input} "
            f"are {len(blocks) + facts.fusion_input} maps, but the file mixes "
            f"{num_maps}."
        )
    return facts.fusion_maps or None, facts.fusion_input
