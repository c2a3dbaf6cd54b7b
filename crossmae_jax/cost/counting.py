"""What a configuration costs, counted: multiply-adds, tokens, parameters.

Multiply-adds (MACs) are those of the program that computes the training loss, traced as
training traces it, within the model: nothing of them is written down here by formula,
so what a model computes is what is counted. Only matrix products and convolutions
count, as in the literature: no norms, softmax, GELU or biases. One multiply-add is what
papers call a FLOP; a device's peak counts it as two. A training step is taken as three
forward passes: a gradient is two more. Where parameters are frozen, it is two more of
what the gradient passes through. What the gradient computes again to save memory does
not count.

CrossMAE (arXiv 2401.14391) and its relatives count what their references compute. That
is not always what is computed here, and `_left_out` is the one place that says where:
the patch projection is counted for every patch (here it runs on the visible ones); the
last linear layer for every token of the decoder's blocks, or where it has none for
every patch in the encoder (here for the patches that are predicted); where an
aggregator lays the tokens out on the grid, for all but the class token. With that the
papers' tables are reproduced, and a share of a device's peak is comparable between
libraries. `Cost.computed` is the count without it.

An aggregator (PR-MIM, arXiv 2411.15746) stands for all that thrown patches cost: the
mixing of places, which runs over the whole grid, the projection of visible features
that are mixed in, and the last linear layer on the thrown patches.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import jax
from ml_collections import ConfigDict

from crossmae_jax import masking, objectives
from crossmae_jax.cost import products
from crossmae_jax.data import pipeline
from crossmae_jax.models import mim

_Path = tuple[str, ...]
_PARTS = ("encoder", "decoder", "aggregator", "head", "teacher")
# Modules that are counted with another one.
_PART_OF = {"fusion": "decoder", "fc_norm": "head", "batch_norm": "head"}
_PATCH_EMBED = ("encoder", "patch_embed", "proj")
_LAST_LAYER = ("decoder", "decoder_pred")


class Part(NamedTuple):
    """Multiply-adds of a part of the model, and its trainable parameters."""

    macs: int
    params: int


class Refresh(NamedTuple):
    """Multiply-adds of one image that the encoder sees whole, and how often it does.

    Attributes:
      passes: over all training images, in so many epochs.
    """

    macs: int
    passes: int
    epochs: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one image's forward pass in training, and the size of the model.

    Attributes:
      num_keep: patches that the encoder sees.
      num_pred: patches that the decoder predicts, 0 without one; likewise `num_thrown`,
        which an aggregator predicts or nothing does.
      decoder_tokens: tokens that the decoder's blocks run on.
      parts: by name. "encoder" and, of a masked model, "decoder", with what stands
        between the two, and "aggregator", zeros if there is none; of a classifier,
        "head". "teacher" is a target's, whose numbers are among the `others`.
      others: numbers of the model that are not trained, by collection: "constants" are
        position tables, "batch_stats" running statistics.
      differentiated: multiply-adds that the gradient passes through.
      computed: multiply-adds that this library computes, all parts together.
      refresh: what it takes besides to look at all training images now and then.
    """

    num_patches: int
    num_keep: int
    num_pred: int
    num_thrown: int
    decoder_tokens: int
    parts: Mapping[str, Part]
    others: Mapping[str, int]
    differentiated: int
    computed: int
    refresh: Refresh | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass."""
        return sum(part.macs for part in self.parts.values())

    @property
    def train_flops(self) -> int:
        """Floating-point operations of a training step, 2 a multiply-add."""
        return 2 * (self.macs + 2 * self.differentiated)

    @property
    def params(self) -> int:
        """All numbers of the model, trained or not."""
        trained = sum(part.params for part in self.parts.values())
        return trained + sum(self.others.values())


def count(config: ConfigDict) -> Cost:
    """Traces the training loss that a configuration describes, and counts.

    No weights are drawn, no data is read and no device is used.

    Raises:
      ValueError: if the configuration contradicts itself.
    """
    objective = objectives.make(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(objective.init, key)
    sizes = {name: _sizes(tree) for name, tree in variables.items()}
    params = sizes.pop("params")
    macs, differentiated = _macs(config, objective, variables, key)

    # A linear layer's multiply-adds over its weights: the tokens that it runs on.
    kernels = {path[:-1]: n for path, n in params.items() if path[-1] == "kernel"}
    rows = {path: n // kernels[path] for path, n in macs.items() if path in kernels}
    grid = objective.model.encoder.grid
    num_patches = grid[0] * grid[1]
    # An objective that draws no patches shows the model all of them.
    tokens = getattr(objective, "counts", masking.TokenCounts(num_patches, 0, 0))
    decoder_tokens = _decoder_tokens(rows)
    # A Swin's patches are smaller than what is masked as one.
    pixels = math.prod(config.data.image_size) * config.data.channels
    width = params[*_PATCH_EMBED, "bias"]
    num_projected = pixels * width // kernels[_PATCH_EMBED]
    left_out = _left_out(rows, kernels, tokens, num_projected, decoder_tokens)

    computed, trainable = _by_part(macs), _by_part(params)
    parts = dict.fromkeys([*_PARTS, *trainable])
    return Cost(
        num_patches=num_patches,
        num_keep=tokens.num_keep,
        num_pred=tokens.num_pred,
        num_thrown=tokens.num_thrown,
        decoder_tokens=decoder_tokens,
        parts={
            name: Part(computed[name] + left_out[name], trainable[name])
            for name in parts
            if name in trainable or name in left_out or name in computed
        },
        others={name: sum(tree.values()) for name, tree in sizes.items()},
        differentiated=differentiated + left_out.total(),
        computed=computed.total(),
        refresh=_refresh(config, objective, variables),
    )


def _sizes(tree: Any) -> dict[_Path, int]:
    """Returns how many numbers each array of a collection has."""
    return {
        path: math.prod(leaf.shape)
        for path, leaf in flax.traverse_util.flatten_dict(tree).items()
    }


def _macs(
    config: ConfigDict, objective: Any, variables: Any, key: Any
) -> tuple[dict[_Path, int], int]:
    """Returns an image's multiply-adds by module, and those that are differentiated."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    num_images = config.data.batch_size // config.optim.accum_steps
    batch = pipeline.blank_batch(config.data, batch_size=num_images)

    def loss(params, others, batch, key):
        return objective.loss({**others, "params": params}, batch, key)

    macs, differentiated = collections.Counter(), 0
    for product in products.trace(loss, variables["params"], others, batch, key):
        if product.module:  # losses, and targets but for a teacher, are no part of it
            macs[product.module] += product.macs
            differentiated += product.macs * product.differentiated
    return (
        {path: number // num_images for path, number in macs.items()},
        differentiated // num_images,
    )


def _refresh(config: ConfigDict, objective: Any, variables: Any) -> Refresh | None:
    """Counts a pass of the encoder over a whole image, if attention maps take any."""
    every = config.get("attention_maps", {}).get("every_epochs", 0.0)
    if not every:
        return None
    batch = pipeline.blank_batch(config.data, batch_size=1)

    def encode(params, others, batch, _key):
        images = objective.normalize(batch)
        variables = {**others, "params": params}
        return objective.model.apply(variables, images, method="encode")

    others = {name: tree for name, tree in variables.items() if name != "params"}
    found = products.trace(encode, variables["params"], others, batch, None)
    passes = math.ceil(config.epochs / every) - 1  # none at the end
    return Refresh(sum(product.macs for product in found), passes, config.epochs)


def _decoder_tokens(rows: Mapping[_Path, int]) -> int:
    """Returns on how many tokens the first MLP in the decoder runs, 0 without one."""
    return next((
        number for path, number in rows.items()
        if path[0] == "decoder" and path[-2:] == ("mlp", "fc1")
    ), 0)


def _left_out(
    rows: Mapping[_Path, int],
    kernels: Mapping[_Path, int],
    tokens: masking.TokenCounts,
    num_projected: int,
    decoder_tokens: int,
) -> collections.Counter:
    """Returns by part what the references compute and this library does not.

    Args:
      rows: tokens that each linear layer runs on here.
      kernels: multiply-adds of each linear layer for a token.
      num_projected: patches of a whole image, as they are projected.
    """
    # The patch projection of patches that are not seen.
    hidden = num_projected - rows[_PATCH_EMBED]
    left_out = collections.Counter(encoder=hidden * kernels[_PATCH_EMBED])
    if any(path[0] == "decoder" for path in rows):
        left_out["aggregator"] = 0  # is named even where there is none
    if _LAST_LAYER in rows:
        # The last layer runs on what is predicted here, and on every token of the
        # decoder's blocks there; the aggregator's share of it stands under its name.
        aggregated = rows[_LAST_LAYER] - tokens.num_pred
        patches = tokens.num_keep + tokens.num_pred
        read = decoder_tokens or patches
        if aggregated:  # the class token has no place on the grid
            read = min(read, patches)
        left_out["decoder"] = (read - rows[_LAST_LAYER]) * kernels[_LAST_LAYER]
        left_out["aggregator"] = aggregated * kernels[_LAST_LAYER]
    return left_out


def _by_part(numbers: Mapping[_Path, int]) -> collections.Counter:
    """Adds up what belongs to each part of the model."""
    parts = collections.Counter()
    for (module, *_), number in numbers.items():
        part = mim.part_of(module)
        parts[_PART_OF.get(part, part)] += number
    return parts
