"""What a question to a model needs of it; without it, what to do."""

import numpy as np

from crossmae_jax import augment, errors
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.models.decoders import Decoder
from crossmae_jax.models.encoders import Encoder
from crossmae_jax.targets import Target


def statistics(card: Card) -> None:
    """Raises ConversionError unless it is known how images are normalised."""
    try:
        augment.check_statistics(mean=card.mean, std=card.std)
    except ValueError as error:
        raise ConversionError(f"{card.origin}: {error}") from error
    if card.mean is None or card.std is None or not (
        len(card.mean) == len(card.std) == card.channels
    ):
        raise ConversionError(
            f"mean={card.mean}, std={card.std} do not say how images are normalised "
            f"for {card.origin}; give mean and std, a value for each of its "
            f"{card.channels} channels, for pixels in 0..1, std above 0."
        )


def head(card: Card) -> None:
    """Raises ConversionError unless there is a classifier's head."""
    if "head" not in card.parts:
        raise ConversionError(
            f"{card.origin} has no head, only {', '.join(card.parts)}; fit one on the "
            "features."
        )


def fusion(card: Card) -> None:
    """Raises ConversionError unless feature maps are mixed."""
    if "fusion" not in card.parts:
        raise ConversionError(
            f"{card.origin} mixes no feature maps: it has {', '.join(card.parts)}, and "
            "no inter-block attention."
        )
    if card.fusion.used_maps is None:
        raise ConversionError(
            f"{card.origin} has an adapter between encoder and decoder, which mixes "
            "feature maps by channels: there is no share of each to be shown."
        )


def decoder(card: Card) -> None:
    """Raises ConversionError unless there is a decoder."""
    if card.kind != "pretrain":
        raise ConversionError(
            f"{card.origin} has no decoder, only {', '.join(card.parts)}; this needs a "
            "checkpoint of pre-training: a run's own directory, or weights that were "
            "imported or exported with all their parts."
        )


def target(card: Card) -> None:
    """Raises ConversionError unless it is known what a decoder predicts."""
    decoder(card)
    if card.normalize is None and card.target is None:
        raise ConversionError(
            f"{card.origin} does not say whether its decoder predicts standardised "
            "patches or pixels, and pictures depend on it; give load(..., "
            "normalize=True) or normalize=False."
        )


def pictures(card: Card, predicted: Target) -> None:
    """Raises ConversionError unless predictions can be turned into pictures."""
    if predicted.caption is None:
        raise ConversionError(
            f"{card.origin} predicts {card.target['kind']}, of which there are no "
            "pictures."
        )


def numbers_of_patches(ids: np.ndarray, *, num: int) -> None:
    """Raises ValueError unless these are numbers of some of so many patches."""
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or (
        ids.min() < 0 or ids.max() >= num
    ):
        raise ValueError(
            f"ids={ids.tolist()}; expected numbers of patches, 0 to {num - 1}, the "
            "same for all images. Of a mask: np.flatnonzero(mask)."
        )


def of_patches(card: Card, predicted: Target, encoder: Encoder) -> None:
    """Raises ConversionError unless a value for each patch is all that is predicted."""
    if list(predicted.grids.values()) != [encoder.grid]:
        cells = ", ".join(
            f"{name} in {rows}x{columns} cells"
            for name, (rows, columns) in predicted.grids.items()
        )
        raise ConversionError(
            f"{card.origin} predicts {cells}, and not one vector for each of "
            f"{encoder.grid[0]}x{encoder.grid[1]} patches."
        )


def blocks(card: Card, of_model: Decoder) -> None:
    """Raises ConversionError if a decoder has no blocks to look into, or is several."""
    if len(of_model.widths) > 1:
        raise ConversionError(
            f"{card.origin} has a decoder for each of {', '.join(of_model.widths)}; "
            "the attention of one is looked at, not of several."
        )
    if not of_model.depth:
        raise ConversionError(
            f"{card.origin}: {of_model.method}'s decoder is one layer without "
            "attention; what its patches attend to is in the encoder: "
            "attention_maps(images, part='encoder')."
        )


def whole_attention(card: Card) -> None:
    """Raises ConversionError if the encoder's blocks see windows of several grids."""
    if card.encoder.windows:
        raise ConversionError(
            f"{card.origin}: the blocks of {card.encoder.title} attend within windows, "
            "on several grids and in several widths, so that neither their attention "
            "nor their outputs can be laid one on another; what there is are tokens "
            "and features of the last: tokens(images), encode(images)."
        )


def one_softmax(card: Card, of_model: Decoder) -> None:
    """Raises SetupError if masked patches attend to each other in a layer apart."""
    if of_model.self_attention and not of_model.gives_visible:
        raise errors.SetupError(
            f"{card.origin} has decoder.self_attention: what goes to masked patches "
            "and what to visible ones comes from two softmaxes, and cannot be "
            "compared. Load an MAE, or a CrossMAE without it."
        )
