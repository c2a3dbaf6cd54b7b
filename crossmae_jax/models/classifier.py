"""An encoder that classifies whole images: pooling, norm and a linear head.

MAE's fine-tuned model (arXiv 2111.06377, appendix A.1) and timm's VisionTransformer:
with pool "cls" the encoder ends in its norm and the class token is classified; with
"mean" the encoder has none, the patch tokens are averaged and the mean is normed.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crossmae_jax.models import layers, vit


class Classified(NamedTuple):
    """What a classifier makes of images.

    Attributes:
      tokens: output of the encoder, the class token first.
      features: the pooled and normed vector that the head sees.
      logits: a value per class; None without a head.
    """

    tokens: Float[Array, "b v d"]
    features: Float[Array, "b d"]
    logits: Float[Array, "b classes"] | None


class Classifier(nn.Module):
    """Classifier.

    Attributes:
      encoder: with its final norm if and only if `pool` is "cls".
      num_classes: 0 for no head.
    """

    encoder: vit.ViT
    pool: str
    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b height width c"]) -> Classified:
        tokens = self.encoder(images).tokens
        if self.pool == "cls":
            features = tokens[:, 0]
        else:
            features = tokens[:, 1:].mean(1)
            features = layers.LayerNorm(self.dtype, name="fc_norm")(features)
        logits = None
        if self.num_classes:
            logits = layers.dense(self.num_classes, self.dtype, name="head")(features)
        return Classified(tokens, features, logits)
