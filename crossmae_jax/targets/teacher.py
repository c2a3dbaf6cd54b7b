"""Target of a frozen teacher's features and attention (TEC, arXiv 2210.11016).

The teacher is a ViT that was trained before; it sees the whole image. With its blocks'
outputs x_1 ... x_L, without a norm behind them, and the queries and keys of its last
block, in heads of width d:

    feature      mean of the last `blocks` of x, patches only; then each channel of an
                 image standardised over its patches: unbiased variance, 1e-6 inside of
                 the root
    attention    softmax(a / temperature) over the patches as keys, a = q k / sqrt(d),
                 of each head; of the class token, and of the `top_k` patches to which
                 it attends most, its own a averaged over the heads

The class token is no key. Whether a are these scores or what the attention's own
softmax, over patches and class token, makes of them, the papers and the release do not
settle: `attention` says "scores" or "probs".

The teacher's weights are a collection of variables of their own, which no optimiser
sees. They begin as those of a file, and lie in the state of a run from then on.
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from crossmae_jax import kinds, ranges
from crossmae_jax.models import encoders, parts, watching
from crossmae_jax.origins import Origin
from crossmae_jax.targets.pixels import standardised
from crossmae_jax.targets.shown import Shown
from crossmae_jax.tokens import CLASS_TOKEN, Encoded, Tokens, grid_size, take_tokens

COLLECTION = "teacher"  # of its weights
ATTENTIONS = ("scores", "probs")


class _Frozen(nn.Module):
    """The teacher under its name, by which its operations are counted."""

    teacher: encoders.Encoder

    def __call__(self, images: Float[Array, "b height width c"]) -> Encoded:
        return self.teacher(images)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """"feature" of every patch, and "attention" of a few; see `targets.Target`.

    Attributes:
      patch_size: side in pixels of the patches that are predicted.
      encoder: the teacher's settings, as in `config.model.encoder`.
      top_k: patches whose attention is predicted, beside the class token's.
      temperature: that its attention is divided by.
      blocks: how many of its last ones the features are the mean of.
      attention: what of it is divided, one of `ATTENTIONS`.
      weights: what a run begins with, of any format.
      dtype: it computes in.

    Raises:
      ValueError: if options cannot be, or its patches are not those of the model.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    encoder: kinds.Group = dataclasses.field(hash=False)  # which has none
    top_k: int
    temperature: float
    blocks: int = 2
    attention: str = "scores"
    weights: str = ""
    dtype: DTypeLike = jnp.float32

    caption = None

    def __post_init__(self):
        vit, grid = self._vit(), grid_size(self.image_size, self.patch_size)
        for name in ("drop_path", "mask_tokens"):
            if value := getattr(vit, name):
                raise ValueError(
                    f"target.encoder.{name}={value} does nothing in a teacher, which "
                    "is not trained and sees whole images; leave it out."
                )
        if not vit.has_cls:
            raise ValueError(
                "The teacher's attention is that of its class token, which "
                f"target.encoder.kind={self.encoder['kind']!r} has not; give a ViT."
            )
        if vit.grid != grid:
            raise ValueError(
                f"The teacher has {vit.grid[0]}x{vit.grid[1]} patches, of "
                f"target.encoder.size={vit.size!r}, but the model {grid[0]}x{grid[1]}; "
                f"give both patches of {self.patch_size} pixels."
            )
        ranges.check("target.top_k", self.top_k, least=1)
        ranges.check("target.blocks", self.blocks, least=1)
        ranges.check("target.temperature", self.temperature, above=0)
        for name, most in (("top_k", grid[0] * grid[1]), ("blocks", vit.depth)):
            if getattr(self, name) > most:
                raise ValueError(
                    f"target.{name}={getattr(self, name)}, but there are {most} in the "
                    "teacher; give at most so many."
                )
        parts.check_choice("target.attention", self.attention, ATTENTIONS)

    def _vit(self) -> encoders.Encoder:
        return kinds.make(
            "target.encoder", encoders.ENCODERS, self.encoder, channels=self.channels,
            image_size=tuple(self.image_size), final_norm=False, learned_positions=True,
            remat="none", dtype=self.dtype,
        )

    @property
    def groups(self) -> dict[str, int]:
        """A distribution for each head."""
        return {"attention": self._vit().num_heads}

    @property
    def widths(self) -> dict[str, int]:
        """Channels of a feature; of attention all patches, for each head."""
        vit = self._vit()
        return {
            "feature": vit.dim,
            "attention": vit.num_heads * vit.grid[0] * vit.grid[1],
        }

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of patches."""
        return dict.fromkeys(("feature", "attention"), self._vit().grid)

    @property
    def starts(self) -> dict[str, Origin]:
        """The teacher's own weights."""
        return {COLLECTION: Origin(
            self.weights, "target.weights", self.encoder, "target.encoder"
        )}

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Draws a teacher that knows nothing: what it is to be comes from a file."""
        images = jnp.zeros((1, *self.image_size, self.channels))
        drawn = _Frozen(teacher=self._vit()).init(key, images)["params"]
        return {COLLECTION: {"encoder": drawn["teacher"]}}

    def __call__(
        self, variables: dict[str, Any], images: Float[Array, "b height width c"]
    ) -> dict[str, Tokens]:
        """Returns the standardised features, and the attention of the chosen rows."""
        vit = self._vit()
        maps, attention, rows = self.seen(variables, images)
        feature = standardised(einops.rearrange(maps, "b n d -> b d n"))
        feature = einops.rearrange(feature, "b d n -> b n d")
        attention = jax.nn.softmax(attention / self.temperature, axis=-1)
        attention = einops.rearrange(attention, "b r h n -> b r (h n)")
        first = jnp.full_like(rows[:, :1], CLASS_TOKEN)
        return {
            "feature": Tokens(feature, None, vit.grid),
            "attention": Tokens(
                attention, jnp.concatenate([first, rows], axis=1), vit.grid
            ),
        }

    def seen(
        self, variables: dict[str, Any], images: Float[Array, "b height width c"]
    ) -> tuple[
        Float[Array, "b n d"], Float[Array, "b r h n"], Int[Array, "b k"]
    ]:
        """Returns what the teacher makes of images, before it becomes a target.

        That is the mean of the last blocks' outputs, the attention of the class token
        and of the chosen patches, and which these are.
        """
        vit, found = self._vit(), {}

        def watch(module, queries, keys, values, bias=None):
            if module.path[-2] == f"blocks_{vit.depth - 1}":
                found["attention"] = self._rows(module, queries, keys, bias)

        own = {"params": {"teacher": variables[COLLECTION]["encoder"]}}
        with watching.attending(watch):
            maps = _Frozen(teacher=vit).apply(own, images).maps[-self.blocks :]
        mean = sum(x.values.astype(jnp.float32) for x in maps) / self.blocks
        return mean, *found["attention"]

    def _rows(self, module, queries, keys, bias):
        """Returns the attention of the rows that are chosen, and their patches."""

        def attention(queries, bias):
            scores = watching.scores_of(module, queries, keys, bias)
            if self.attention == "probs":
                scores = jax.nn.softmax(scores, axis=-1)
            return scores[:, :, :, 1:]  # b h r n

        bias_of_class = None if bias is None else bias[:, :, :1]
        of_class = attention(queries[:, :1], bias_of_class)
        _, chosen = jax.lax.top_k(of_class[:, :, 0].mean(1), self.top_k)
        if bias is not None:
            bias = jnp.broadcast_to(bias, (len(queries), *bias.shape[1:]))
            bias = jnp.take_along_axis(bias, chosen[:, None, :, None] + 1, axis=2)
        of_chosen = attention(take_tokens(queries, chosen + 1), bias)
        rows = jnp.concatenate([of_class, of_chosen], axis=2)
        return einops.rearrange(rows, "b h r n -> b r h n"), chosen

    def pixels(
        self, predicted: dict[str, Tokens], images: Float[Array, "b height width c"]
    ) -> Shown:
        """Is never called: there are no pictures of features."""
        raise AssertionError("without a caption nobody asks for pixels")
