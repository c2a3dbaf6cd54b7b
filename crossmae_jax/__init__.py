"""Masked image modelling in JAX: MAE, CrossMAE and PR-MIM, on CPU, GPU and TPU.

Terms, used everywhere with one meaning:

    patch           a square of pixels; patches are numbered in raster order
    token           a vector that stands for a patch, or the class token
    visible/masked  patches the encoder sees / does not see
    mask_ratio      share of all patches that is masked
    pred_ratio      share of all patches that is predicted, <= mask_ratio
    throw_ratio     share of all patches that is masked and kept from the decoder
    retained        masked patches that the decoder works on; `pred` in token ids
    thrown          masked patches that it does not, predicted by an aggregator or not
    aggregator      predicts thrown patches from the tokens around them
    feature maps    the encoder's input and the outputs of its blocks
    context         what a decoder block attends to
    fusion          makes contexts of the feature maps
    part, kind      a model has an encoder, a fusion, a decoder, an aggregator; the kind
                    of a part is the class of it, whose arguments are its settings
    sample number   counts samples over a whole run; with the seed it decides which
                    image comes, how it is cropped and which patches are masked

Axes: b batch, n all patches, v visible, q queries (retained patches), p predicted
(retained, then thrown), k keys, h heads, d and e channels of encoder and decoder,
t values in a patch vector; row col d for tokens on the grid; height width c for
images.

Importing this package does not import JAX: loader workers stay light.
"""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> Any:
    """Returns a model to look into: features, reconstructions, attention.

    Takes a run of ours or weights of any format; see `probing.loading.load` for
    the options and `probing.pretrained.Pretrained` for what comes back.

    Example:
      model = crossmae_jax.load("runs/mine")
      features = model.encode(images)  # images: u8 [b height width c]
    """
    from crossmae_jax.probing import loading

    return loading.load(path, **options)
