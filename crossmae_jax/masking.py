"""Which patches the encoder sees and which the decoder predicts. Masks are data.

Every patch gets a noise, and of the N patches in the order of their noise fractions of
ALL patches are cut: mask ratio p, prediction ratio gamma (CrossMAE, arXiv 2401.14391,
section 3.3) and throwing ratio t (PR-MIM, arXiv 2411.15746, section 3.1):

    visible    = int(N (1 - p))        the encoder's input, in the order of noise
    skipped    = int(N (p - gamma))    neither seen nor predicted
    thrown     = round(N t)            masked, and kept from the decoder
    predicted  = what remains          retained: the decoder's queries, in raster order

`int` truncates in double precision, as the PyTorch references do: 100 patches at
p = 0.9 leave 9 visible, not 10. MAE (arXiv 2111.06377) is gamma = p, t = 0. An
aggregator (models/aggregator.py) predicts the thrown patches as well; without one they
are skipped ones under another name: gamma = 0.75, t = 0.5 decodes the very patches of
gamma = 0.25, t = 0.

The retained patches are those of the largest noise, or the greedy `furthest` choice
among all masked ones (PR-MIM, section 3.3), which covers the image evenly.

Methods differ in the noise, one of `NOISES`: `uniform`, or drawn once for many images
(`shared`: GreenMIM, arXiv 2205.13515), or larger where the weight of a patch is larger
(`weighted`: AMT, arXiv 2211.15362); and in what is masked as one, a patch or a `unit`,
a square of patches (SimMIM, arXiv 2111.09886). Then the N of the visible ones counts
units; of the others, too, if `throw_by` says so, and else patches of the masked units.

Uniform and weighted noise come from a key per sample, `fold_in(key, sample number)`: a
mask depends on the seed, the sample and its weights alone, neither on the batch nor on
devices or hosts. The model never samples; it is handed the `TokenIds`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from crossmae_jax.tokens import spread

ROUNDINGS = ("floor", "ceil")


class TokenCounts(NamedTuple):
    """How many patches of an image stay visible, are retained, and are thrown.

    `num_pred` counts what the decoder predicts, and not what an aggregator does.
    """

    num_keep: int
    num_pred: int
    num_thrown: int


class TokenIds(NamedTuple):
    """Patch numbers of each sample.

    Attributes:
      keep: visible patches, in the order in which the encoder sees them.
      pred: retained patches, the decoder's own, in raster order.
      thrown: masked patches kept from the decoder, in raster order.
    """

    keep: Int[Array, "b v"]
    pred: Int[Array, "b q"]
    thrown: Int[Array, "b thrown"]


# Places at which targets are asked for, by their names; of others all masked ones.
Asked = Mapping[str, Int[Array, "b r"]]


def _floor(ratio: float) -> float:
    """Rounds down to three digits, and off the edge where truncation bites."""
    return math.floor((ratio - 1e-9) * 1000) / 1000


def token_counts(
    num_patches: int,
    *,
    mask_ratio: float,
    pred_ratio: float,
    throw_ratio: float = 0.0,
    rounding: str = "floor",
    num_keep: int | None = None,
) -> TokenCounts:
    """Returns the numbers of visible, decoded and thrown patches, or of units.

    Args:
      rounding: of the visible ones. "floor" rounds the masked ones up, as MAE and
        SimMIM do; "ceil" rounds them and the predicted ones down, as AMT does.
      num_keep: so many visible ones, whatever `mask_ratio` is: those of whole units.

    Raises:
      ValueError: if more would be predicted or thrown than was masked, or if nothing
        is left to see or to decode.
    """
    if rounding not in ROUNDINGS:
        known = ", ".join(ROUNDINGS)
        raise ValueError(f"Unknown masking.rounding {rounding!r}. Known: {known}.")
    if num_patches < 2:
        raise ValueError(
            f"An image of {num_patches} patch (masking.unit: of what is masked as one) "
            "cannot be seen and hidden in part; raise config.data.image_size, or give "
            "config.model.encoder.size smaller patches."
        )
    _check_ratios(mask_ratio, pred_ratio, throw_ratio)
    if num_keep is None and rounding == "floor":
        num_keep = int(num_patches * (1 - mask_ratio))
    elif num_keep is None:
        num_keep = num_patches - int(num_patches * mask_ratio)
    num_skip = int(num_patches * (mask_ratio - pred_ratio))
    if rounding == "ceil":
        num_skip = num_patches - num_keep - int(num_patches * pred_ratio)
    num_thrown = round(num_patches * throw_ratio)
    num_pred = num_patches - num_keep - num_skip - num_thrown
    if pred_ratio > mask_ratio:
        raise ValueError(
            f"pred_ratio={pred_ratio} predicts {int(num_patches * pred_ratio)} of "
            f"{num_patches} patches but mask_ratio={mask_ratio} removes only "
            f"{num_patches - num_keep}; lower pred_ratio or raise mask_ratio."
        )
    if num_keep < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves none of {num_patches} patches visible; "
            f"lower mask_ratio to {_floor(1 - 1 / num_patches)} or less."
        )
    if throw_ratio > mask_ratio:
        raise ValueError(
            f"throw_ratio={throw_ratio} throws {num_thrown} of {num_patches} patches "
            f"but mask_ratio={mask_ratio} removes only {num_patches - num_keep}. Both "
            "are fractions of all patches; lower throw_ratio."
        )
    if num_pred < 1:
        raise ValueError(
            f"throw_ratio={throw_ratio} throws {num_thrown} of {num_patches} patches, "
            f"and pred_ratio={pred_ratio} predicts {num_pred + num_thrown}: none is "
            "left to decode. Lower throw_ratio or raise pred_ratio."
        )
    return TokenCounts(num_keep, num_pred, num_thrown)


def _check_ratios(mask_ratio: float, pred_ratio: float, throw_ratio: float) -> None:
    """Raises ValueError if one of them is out of its own range."""
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} must lie between 0 and 1.")
    if not 0 < pred_ratio < math.inf:
        raise ValueError(f"pred_ratio={pred_ratio} must be above 0.")
    if not 0 <= throw_ratio < math.inf:
        raise ValueError(f"throw_ratio={throw_ratio} must be 0 or more.")


def furthest(
    candidates: Int[Array, "b m"], first: Int[Array, "b"], *, num: int, columns: int
) -> Int[Array, "b num"]:
    """Chooses candidates that lie far from each other: greedy furthest-point sampling.

    From `first` on, the candidate whose nearest chosen one is furthest away is added
    (Euclidean distance of grid positions). Among equals the first in the list is
    taken, and on a grid there are many: give the candidates in random order, or the
    choice leans to the top left.

    Args:
      candidates: patch numbers of each sample.
      first: position in the list of the patch to begin with.
      num: how many to choose.
      columns: patches in a row of the grid.

    Returns:
      Positions in the list, in the order of choice.
    """
    row, column = candidates // columns, candidates % columns
    position = jnp.broadcast_to(jnp.arange(candidates.shape[1])[None], candidates.shape)
    largest = jnp.iinfo(candidates.dtype).max

    def further(a, b):
        """Picks the larger distance, among equal ones the earlier position."""
        keep = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(keep, x, y) for x, y in zip(a, b, strict=True))

    def add(carry, _):
        (newest, its_row, its_column), distance = carry
        squared = (row - its_row[:, None]) ** 2 + (column - its_column[:, None]) ** 2
        distance = jnp.minimum(distance, squared)
        # One reduction brings the coordinates along; looking them up takes as long.
        _, *following = jax.lax.reduce(
            (distance, position, row, column),
            tuple(jnp.full((), x, row.dtype) for x in (-1, largest, 0, 0)),
            further, dimensions=(1,),
        )
        return (tuple(following), distance), newest

    is_first = position == first[:, None]
    places = (jnp.where(is_first, x, 0).sum(1) for x in (row, column))
    start = (first, *places), jnp.full_like(candidates, largest)
    _, chosen = jax.lax.scan(add, start, length=num)
    return chosen.T


def token_ids(
    noise: Float[Array, "b n"], counts: TokenCounts, *, columns: int | None = None
) -> TokenIds:
    """Orders patches by noise: the smallest stay visible, the largest are decoded.

    Args:
      columns: patches in a row of the grid; then the decoded patches are not those of
        the largest noise but the `furthest` ones of all masked, in the order of noise.
    """
    num_keep, num_pred, num_thrown = counts
    shuffle = jnp.argsort(noise, axis=1, stable=True)
    masked = shuffle[:, num_keep:]
    if columns is not None:
        chosen = furthest(
            masked, jnp.zeros_like(masked[:, 0]), num=num_pred, columns=columns
        )
        is_chosen = mask_of(chosen, num_patches=masked.shape[1])
        last = jnp.argsort(is_chosen, axis=1, stable=True)
        masked = jnp.take_along_axis(masked, last, axis=1)
    start = masked.shape[1] - num_pred
    return TokenIds(
        keep=shuffle[:, :num_keep],
        pred=jnp.sort(masked[:, start:], axis=1),
        thrown=jnp.sort(masked[:, start - num_thrown : start], axis=1),
    )


Batch = Mapping[str, Array]


@runtime_checkable
class Noise(Protocol):
    """Orders the patches of each sample: a frozen dataclass, or without options a
    function.

    Its fields are options of `config.masking`, beside those of `sampling.Sampler`. It
    refuses those that can never be used when it is made, with a ValueError.
    """

    def __call__(
        self, key: Key[Array, ""], batch: Batch, *, num: int
    ) -> Float[Array, "b {num}"]:
        """Returns a number for each patch: the smallest stay visible.

        What it returns for a sample depends on the key and the sample's own part of
        the batch, so that a mask is the same wherever the sample lies.

        Args:
          batch: the fields of `config.data.transform` on the devices, "image" as uint8
            among them, and "sample", a number for each sample that no other has.
          num: how many patches there are, or units of patches.

        Raises:
          ValueError: if the batch lacks what it looks at.
        """
        ...


def uniform(key: Key[Array, ""], batch: Batch, *, num: int) -> Float[Array, "b {num}"]:
    """Draws for each sample from its own key: a uniformly random order."""

    def draw(number):
        return jax.random.uniform(jax.random.fold_in(key, number), (num,))

    return jax.vmap(draw)(batch["sample"])


@dataclasses.dataclass(frozen=True)
class Shared:
    """Draws once for several samples in a row, from the number of the first of them.

    A batch of fewer shares one draw.

    Attributes:
      together: so many samples, more than 1.

    Raises:
      ValueError: if it is not, or, when called, if the batch is no multiple of it.
    """

    together: int = 1

    def __post_init__(self):
        if self.together < 2:
            raise ValueError(
                f"masking.together={self.together} with masking.noise='shared': so many"
                " images in a row share a mask; give more than 1."
            )

    def __call__(
        self, key: Key[Array, ""], batch: Batch, *, num: int
    ) -> Float[Array, "b {num}"]:
        size = len(batch["sample"])
        together = min(self.together, size)
        if size % together:
            raise ValueError(
                f"masking.together={together} does not divide a batch of {size} images;"
                " make config.data.batch_size / config.optim.accum_steps a multiple of "
                "it."
            )
        first = {"sample": batch["sample"][::together]}
        return jnp.repeat(uniform(key, first, num=num), together, axis=0)


def weighted(key: Key[Array, ""], batch: Batch, *, num: int) -> Float[Array, "b {num}"]:
    """Draws noise whose order is weighted: log w + Gumbel noise, w = batch["weights"].

    The largest noise of a sample belongs to a patch with probability w / sum w, the
    next likewise among those that are left. Weights `[b n]` are 0 or more, in any
    scale; patches of weight 0 come before all others, in random order.

    Raises:
      ValueError: if the batch has no weights, or another number of them.
    """
    if "weights" not in batch:
        raise ValueError(
            "masking.noise='weighted' orders patches by batch['weights'], a number a "
            f"patch, but the batch has only {', '.join(sorted(batch))}; give data with "
            "weights, or set config.masking.noise='uniform'."
        )
    if batch["weights"].shape[1] != num:
        raise ValueError(
            f"masking.noise='weighted': batch['weights'] has "
            f"{batch['weights'].shape[1]} numbers for each sample, but {num} patches "
            "or units are to be ordered; set config.data.weights_grid to their grid; "
            "with masking.unit above 1 masking.throw_by='unit'."
        )

    def draw(number):
        return jax.random.gumbel(jax.random.fold_in(key, number), (num,))

    weights = jnp.maximum(batch["weights"], jnp.finfo(jnp.float32).tiny)  # not all -inf
    return jnp.log(weights) + jax.vmap(draw)(batch["sample"])


NOISES = {"uniform": uniform, "shared": Shared, "weighted": weighted}


def expanded(ids: TokenIds, *, unit: int, grid: tuple[int, int]) -> TokenIds:
    """Returns the patches of units, squares of `unit` x `unit` patches.

    In `keep` the patches of a unit stay together, row by row.

    Args:
      ids: numbers of units, in raster order.
      grid: rows and columns of patches; multiples of `unit`.
    """
    columns = grid[1] // unit
    row, column = jnp.divmod(jnp.arange(unit**2), unit)
    offsets = row * grid[1] + column

    def patches(units):
        first = units // columns * unit * grid[1] + units % columns * unit
        return (first[:, :, None] + offsets[None, None]).reshape(units.shape[0], -1)

    return TokenIds(
        keep=patches(ids.keep),
        pred=jnp.sort(patches(ids.pred), axis=1),
        thrown=jnp.sort(patches(ids.thrown), axis=1),
    )


def mask_of(ids: Int[Array, "b k"], *, num_patches: int) -> Bool[Array, "b n"]:
    """Returns True at the given patches of each sample."""

    def mask(ids):
        return jnp.zeros(num_patches, bool).at[ids].set(True, unique_indices=True)

    return jax.vmap(mask)(ids)


def coverage(
    ids: Int[Array, "b k"], *, grid: tuple[int, int], of: tuple[int, int]
) -> Float[Array, "b n"]:
    """Returns which share of each cell of another grid the given patches cover.

    0 or 1 where cells are patches or parts of one, the mean over patches where a cell
    holds several.

    Args:
      ids: numbers of patches of `grid`.
      of: rows and columns of the cells; multiples or divisors of those of `grid`.

    Raises:
      ValueError: if the grids do not fit.
    """
    mask = mask_of(ids, num_patches=grid[0] * grid[1]).astype(jnp.float32)
    return spread(mask.reshape(-1, *grid), of=of).reshape(-1, of[0] * of[1])
