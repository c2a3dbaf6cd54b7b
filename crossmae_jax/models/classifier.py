"""An encoder that classifies whole images: pooling, norm and a linear head.

Fine-tuning (MAE, arXiv 2111.06377, appendix A.1) and timm's VisionTransformer: with
pool "cls" the encoder ends in its norm and the class token is classified; with "mean"
the encoder has none, the patch tokens are averaged and the mean is normed. With
"normed_mean", Swin's (arXiv 2103.14030), tokens are normed first and then averaged.

Linear probing (the same appendix) puts a batch norm without scale and bias before the
head. Its statistics are those of the whole batch, over all devices: the step is one
global program. The reference's are those of each GPU's share, 512 of 16,384 images:
noisier, and another number on another number of GPUs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from crossmae_jax import ranges
from crossmae_jax.models import encoders, layers, parts
from crossmae_jax.tokens import Tokens

POOLS = ("cls", "mean", "normed_mean")
HEAD_NORMS = ("none", "batch")


class Classified(NamedTuple):
    """What a classifier makes of images.

    Attributes:
      tokens: output of the encoder.
      features: the pooled and normed vector; a batch norm belongs to the head.
      logits: a value per class; None without a head.
    """

    tokens: Tokens
    features: Float[Array, "b d"]
    logits: Float[Array, "b classes"] | None


class BatchNorm(nn.Module):
    """Batch norm without scale and bias, in float32, with PyTorch's running statistics.

    A training batch is normed with its own biased variance; the running variance takes
    up the unbiased one. Both statistics live in the collection "batch_stats".
    """

    epsilon: float = 1e-6
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], *, train: bool) -> Float[Array, "b d"]:
        num, dim = x.shape
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, dim)
        running_var = self.variable("batch_stats", "var", jnp.ones, dim)
        mean, var = running_mean.value, running_var.value
        x = x.astype(jnp.float32)
        if train:
            if num < 2:
                raise ValueError(
                    "A batch of 1 has no variance to norm it with; raise "
                    "config.data.batch_size, or lower config.optim.accum_steps."
                )
            mean = x.mean(0)
            var = jnp.mean((x - mean[None]) ** 2, axis=0)
            if not self.is_initializing():
                new, old = self.momentum, 1 - self.momentum
                running_mean.value = old * running_mean.value + new * mean
                unbiased = var * (num / (num - 1))
                running_var.value = old * running_var.value + new * unbiased
        return (x - mean[None]) / jnp.sqrt(var + self.epsilon)[None]


class Classifier(nn.Module):
    """Classifier.

    Attributes:
      encoder: with its final norm unless `pool` is "mean".
      pool: one of `POOLS`.
      num_classes: 0 for no head.
      head_norm: one of `HEAD_NORMS`: "batch" for linear probing, else "none".
      head_std: standard deviation of the head's initial weights. MAE takes 2e-5 to
        fine-tune and 0.01 for linear probing, from a normal law truncated at 2, which
        for such deviations is never reached. Its initial bias is 0.

    Raises:
      ValueError: for an unknown choice.

    Example:
      logits, updated = model.apply(
          variables, images, train=True, mutable=["batch_stats"],
          rngs={"drop_path": key}
      )
    """

    encoder: encoders.Encoder
    pool: str
    num_classes: int
    dtype: DTypeLike = jnp.float32
    head_norm: str = "none"
    head_std: float = 2e-5

    def __post_init__(self):
        parts.check_choice("model.pool", self.pool, POOLS)
        if self.pool == "cls" and not self.encoder.has_cls:
            raise ValueError(
                "model.pool='cls' classifies a class token, which this encoder has "
                "not; set config.model.pool='normed_mean'."
            )
        parts.check_choice("model.head_norm", self.head_norm, HEAD_NORMS)
        ranges.check("model.head_std", self.head_std, least=0)
        super().__post_init__()

    def setup(self):
        # A layer that is not called has no parameters.
        self.fc_norm = layers.LayerNorm(self.dtype)
        self.batch_norm = BatchNorm()
        self.head = layers.Dense(
            self.num_classes, self.dtype, nn.initializers.normal(self.head_std)
        )

    def __call__(
        self, images: Float[Array, "b height width c"], *, train: bool = False
    ) -> Classified:
        """Classifies images.

        Args:
          train: norms with the statistics of the batch and adds them to the running
            ones, where there is a batch norm. Stochastic depth asks for a key instead,
            see `vit.ViT`.
        """
        tokens = self.encoder(images).last
        features = self.pooled(tokens)
        logits = self.classify(features, train=train) if self.num_classes else None
        return Classified(tokens, features, logits)

    def pooled(self, tokens: Tokens) -> Float[Array, "b d"]:
        """Returns one vector of an image's tokens."""
        if self.pool == "cls":
            return tokens.cls[:, 0]
        if self.pool == "normed_mean":
            return tokens.mean().astype(self.dtype)
        return self.fc_norm(tokens.values.mean(1))

    def classify(
        self, features: Float[Array, "b d"], *, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns the logits of pooled vectors."""
        if self.head_norm == "batch":
            features = self.batch_norm(features, train=train)
        return self.head(features)


def ends_in_norm(pool: str) -> bool:
    """Returns whether the encoder of a classifier ends in a norm."""
    return pool != "mean"


def build(config: ConfigDict) -> Classifier:
    """Makes the classifier that `config.model` and `config.data` describe.

    Raises:
      ValueError: for an unknown choice, or choices that do not fit each other.
    """
    parts.check_settings(
        config, ("encoder", "pool", "head_norm", "head_std", "remat", "dtype")
    )
    model = config.model
    head = {name: model[name] for name in ("head_norm", "head_std") if name in model}
    return Classifier(
        encoder=encoders.build_encoder(
            config, final_norm=ends_in_norm(model.pool), learned_positions=True
        ),
        pool=model.pool, num_classes=config.data.num_classes,
        dtype=parts.computing(model)["dtype"], **head,
    )
