"""Attention weights: looked at, added up as CrossMAE's figure 1 does, and taken away.

On the hot path weights exist in a kernel only; `models.watching` records them.

Magnitudes (CrossMAE, arXiv 2401.14391, figure 1, section 3.1 and appendix A.1). Of each
decoder block the weights from masked patches to visible ones and to masked ones. The
paper does not write its normalisation down; the only one that fits its table:

    mu = sum over heads of the mean over (masked query, key) pairs of A

where the class token is a visible key and a patch's own key a masked one. Rows of A sum
to 1, so that for each block, whatever image and weights,

    (1 + visible) mu_visible + masked mu_masked = heads

The paper's numbers are sums over the blocks: 1.42 and 0.39 for MAE ViT-B. They are
means per key, and there are three times as many masked keys as visible ones; beside
them stands the share of the attention's mass, (1 + visible) mu_visible / heads.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from crossmae_jax import masking, tables
from crossmae_jax.models import mim, watching
from crossmae_jax.tokens import CLASS_TOKEN, Tokens

WITHOUT = ("masked", "visible")


class AttentionMaps(NamedTuple):
    """Attention weights of blocks, and which tokens attend to which.

    Attributes:
      weights: softmax weights of every block; rows sum to 1.
      queries: patch number of each query, `CLASS_TOKEN` for the class token.
      keys: likewise, of each key.
    """

    weights: Float[Array, "i b h q k"]
    queries: Int[Array, "b q"]
    keys: Int[Array, "b k"]


class Magnitudes(NamedTuple):
    """How much masked patches attend to visible and to masked ones, a value per block.

    Attributes:
      visible: sum over heads of the mean weight from a masked query to a visible key,
        the class token included.
      masked: the same to a masked key, the query's own included. 0 in decoders whose
        queries see the encoder only.
      num_visible: visible keys of an image, the class token included.
      num_masked: masked keys, 0 where there are none.
    """

    visible: Float[np.ndarray, "*b i"]
    masked: Float[np.ndarray, "*b i"]
    num_visible: int
    num_masked: int

    @property
    def share(self) -> Float[np.ndarray, "*b i"]:
        """Share of the attention's mass on visible keys, a value per block."""
        visible = self.num_visible * self.visible
        return visible / (visible + self.num_masked * self.masked)

    def table(self) -> str:
        """Returns the numbers in Markdown: a row per block, and their sum."""
        header = ("block", "to visible", "to masked", "mass on visible")
        rows = [
            (f"{number}", visible, masked, share)
            for number, (visible, masked, share) in enumerate(
                zip(self.visible, self.masked, self.share, strict=True), start=1
            )
        ]
        whole = self._replace(
            visible=self.visible.sum(keepdims=True),
            masked=self.masked.sum(keepdims=True),
        )
        rows.append(("sum", whole.visible[0], whole.masked[0], whole.share[0]))
        cells = (
            (name, f"{visible:.3f}", f"{masked:.3f}", tables.percent(float(share)))
            for name, visible, masked, share in rows
        )
        return tables.markdown(tables.Table(header, tuple(cells)))


@contextlib.contextmanager
def without(
    kind: str, ids: masking.TokenIds, *, keep_own: bool = False
) -> Iterator[None]:
    """Takes attention away from the masked patches in MAE's decoder.

    Test-time ablation (CrossMAE, arXiv 2401.14391, in review): before the softmax, so
    that what is left sums to 1. The paper leaves open what becomes of a patch's own key
    and of the class token; here the class token counts as visible, and visible patches
    attend as ever.

    Args:
      kind: "masked": masked patches see no masked ones; "visible": no visible ones.
      keep_own: with "masked", a patch still sees itself.

    Raises:
      ValueError: for another kind.
    """
    if kind not in WITHOUT:
        raise ValueError(f"Unknown attention {kind!r}. Known: {', '.join(WITHOUT)}.")

    def hidden(num):
        is_masked = np.arange(num) >= num - ids.pred.shape[1]
        others = is_masked if kind == "masked" else ~is_masked
        taken = is_masked[:, None] & others[None]
        if keep_own:
            taken &= ~np.eye(num, dtype=bool)
        return jnp.where(taken, -jnp.inf, 0.0)[None, None]

    def change(module, queries, keys, values, bias=None):
        if module.path[0] != "decoder":
            return None
        bias = hidden(queries.shape[1])
        weights = watching.weights_of(module, queries, keys, bias)
        heads = values.reshape(*values.shape[:2], module.num_heads, -1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, heads.astype(jnp.float32))
        return module.proj(out.reshape(queries.shape).astype(queries.dtype))

    with watching.attending(change):
        yield


def predict_without(
    kind: str | None,
    model: mim.MaskedImageModel,
    variables: Any,
    images: Float[Array, "b height width c"],
    ids: masking.TokenIds,
    *,
    keep_own: bool = False,
) -> dict[str, Tokens]:
    """Returns what a model predicts `without` some attention; None takes nothing away.

    Raises:
      ValueError: if the model has no such attention, or gives back what was taken.
    """
    if keep_own and kind != "masked":
        raise ValueError(
            f"keep_own=True with without={kind!r}: it says what becomes of a patch's "
            "own key with without='masked'; leave it out."
        )
    if kind is None:
        return model.apply(variables, images, ids)
    if not model.decoder.gives_visible or not model.decoder.depth:
        raise ValueError(
            f"without={kind!r} is about one self-attention over visible and masked "
            f"patches, which {model.decoder.method}'s decoder does not have; load an "
            "MAE."
        )
    if model.aggregators:
        raise ValueError(
            f"without={kind!r}: this model's aggregator would give masked patches back "
            "what was taken; load an MAE without one."
        )
    with without(kind, ids, keep_own=keep_own):
        return model.apply(variables, images, ids)


@contextlib.contextmanager
def decoding() -> Iterator[list[tuple[tuple[Tokens, ...], tuple[Tokens, ...]]]]:
    """Collects the contexts and the tokens of every decoder that is called meanwhile.

    Inside of a function that is jitted.
    """
    calls = []

    def watch(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        if context.module.path == ("decoder",) and context.method_name == "__call__":
            calls.append((args[0], tuple(out.values())))
        return out

    with nn.intercept_methods(watch):
        yield calls


def of_whole_images(recorded: dict[str, Float[Array, "b h k k"]]) -> AttentionMaps:
    """Returns what was recorded while a ViT encoded whole images."""
    weights = jnp.stack(list(recorded.values()))
    num = weights.shape[-1]
    tokens = jnp.arange(CLASS_TOKEN, num - 1)
    tokens = jnp.broadcast_to(tokens[None], (weights.shape[1], num))
    return AttentionMaps(weights, tokens, tokens)


def of_decoder(
    model: mim.MaskedImageModel,
    variables: Any,
    images: Float[Array, "b height width c"],
    ids: masking.TokenIds,
) -> AttentionMaps:
    """Returns the attention of a decoder, for given visible and masked patches.

    Queries and keys are in the decoder's order. MAE: class token, visible, masked
    patches, in both. CrossMAE: masked patches; class token and visible patches; what
    its queries see of each other, if they do, is left out.
    """
    with watching.recording() as recorded, decoding() as calls:
        model.apply(variables, images, ids)
    ((contexts, (tokens,)),) = calls
    keys = tokens if model.decoder.gives_visible else contexts[-1]
    weights = jnp.stack(_of_decoder(recorded))
    return AttentionMaps(weights, queries=tokens.places, keys=keys.places)


def magnitudes(
    model: mim.MaskedImageModel,
    variables: Any,
    images: Float[Array, "b height width c"],
    ids: masking.TokenIds,
) -> Magnitudes:
    """Returns the magnitudes of each image: the arrays are [b i].

    Of no block are the weights kept.
    """
    num_visible, num_pred = ids.keep.shape[1], ids.pred.shape[1]
    num_visible += model.encoder.has_cls

    def per_key(weights):  # b h q k -> b k: over heads and masked queries
        return weights[:, :, -num_pred:].sum(1).mean(1)

    with watching.recording(per_key) as recorded:
        model.apply(variables, images, ids)
    keys = jnp.stack(_of_decoder(recorded), axis=1)  # b i k
    num_masked = keys.shape[-1] - num_visible
    return Magnitudes(
        visible=keys[..., :num_visible].mean(-1),
        masked=keys[..., num_visible:].sum(-1) / max(num_masked, 1),
        num_visible=num_visible, num_masked=num_masked,
    )


def _of_decoder(recorded: dict[str, Array]) -> list[Array]:
    """Returns what was recorded in the decoder's blocks, in their order."""
    names = [name for name in recorded if name.startswith("decoder/")]
    crosses = [name for name in names if name.endswith("cross_attn")]
    return [recorded[name] for name in crosses or names]
