"""The masks of a configuration: `config.masking` on a grid of patches."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from crossmae_jax import kinds, masking

RETAIN = ("furthest", "random")
THROW_BY = ("patch", "unit")
_PATCHES = 2**32 - 2  # folded into a key, where samples have their numbers


def make(options: kinds.Group, *, grid: tuple[int, int]) -> "Sampler":
    """Returns the sampler that `config.masking` describes.

    Options that are none of a sampler are those of its noise.

    Raises:
      ValueError: for an unknown noise or option, one of another noise that is not at
        its default, and for options that contradict each other.
    """
    own = {field.name for field in dataclasses.fields(Sampler)}
    own -= {"grid", "noise"}
    given = {name: value for name, value in options.items() if name in own}
    of_noise = {name: value for name, value in options.items() if name not in own}
    known = own | {"noise"} | kinds.known_options(masking.NOISES)
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"Unknown option masking.{unknown[0]}={options[unknown[0]]!r}. Known: "
            f"{', '.join(sorted(known))}."
        )
    noise = kinds.make("masking", masking.NOISES, of_noise, key="noise")
    return Sampler(grid, noise=noise, **given)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws the masks of batches: `config.masking` on a grid of patches.

    Attributes:
      grid: rows and columns of patches.
      mask_ratio: share of all patches that is masked; likewise `pred_ratio`,
        `throw_ratio`: see `masking`.
      retain: which masked patches are decoded rather than thrown, one of `RETAIN`.
      noise: orders the patches.
      unit: patches along the side of what is masked as one.
      throw_by: what is decoded or thrown as one, where `unit` is more than a patch: a
        masked "patch", which every method's paper counts in, or a "unit".
      rounding: see `masking.token_counts`.

    Raises:
      ValueError: if these contradict each other.
    """

    grid: tuple[int, int]
    mask_ratio: float
    pred_ratio: float
    throw_ratio: float = 0.0
    retain: str = "random"
    noise: masking.Noise = masking.uniform
    unit: int = 1
    rounding: str = "floor"
    throw_by: str = "patch"

    def __post_init__(self):
        for name, known in (("retain", RETAIN), ("throw_by", THROW_BY)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Unknown masking.{name} {getattr(self, name)!r}. Known: "
                    f"{', '.join(known)}."
                )
        rows, columns = self.grid
        if self.unit < 1 or rows % self.unit or columns % self.unit:
            raise ValueError(
                f"masking.unit={self.unit} does not divide a grid of {rows}x{columns} "
                "patches into squares; give a common divisor of both sides."
            )
        weighs = self.noise is masking.weighted
        if weighs and self.unit > 1 and self.throw_by == "patch":
            raise ValueError(
                f"masking.noise='weighted' with masking.unit={self.unit} has a weight "
                "per unit, and none to order patches by; set masking.throw_by='unit'."
            )
        num_keep, num_pred, _ = self.counts
        if self.retain == "furthest" and num_pred == self.num_patches - num_keep:
            raise ValueError(
                "masking.retain='furthest' chooses among the masked patches, but all "
                f"{num_pred} of them are decoded: {self.throwing}, or set "
                "retain='random'."
            )

    @property
    def num_patches(self) -> int:
        """How many patches there are."""
        return self.grid[0] * self.grid[1]

    @property
    def counts(self) -> masking.TokenCounts:
        """How many patches are seen, decoded and thrown."""
        ratios = dict(
            mask_ratio=self.mask_ratio, pred_ratio=self.pred_ratio,
            throw_ratio=self.throw_ratio, rounding=self.rounding,
        )
        area = self.unit**2
        num_units = self.num_patches // area
        if self.throw_by == "unit" or self.unit == 1:
            units = masking.token_counts(num_units, **ratios)
            return masking.TokenCounts(*(num * area for num in units))
        whole = dict(pred_ratio=self.mask_ratio, throw_ratio=0.0)
        num_keep = masking.token_counts(num_units, **ratios | whole).num_keep
        return masking.token_counts(
            self.num_patches, num_keep=num_keep * area, **ratios
        )

    @property
    def throwing(self) -> str:
        """What is thrown and how to throw more, for an error's text."""
        return (
            f"throw_ratio={self.throw_ratio} throws {self.counts.num_thrown} of "
            f"{self.num_patches} patches; raise config.masking.throw_ratio"
        )

    def draw(self, key: Key[Array, ""], batch: masking.Batch) -> masking.TokenIds:
        """Draws visible, decoded and thrown patches of each sample, for training.

        Args:
          batch: "sample" holds a number per sample, and whatever the noise looks at.
        """
        return self._cut(self.counts, key, batch)

    def draw_all(
        self, key: Key[Array, ""], batch: masking.Batch, *, throw: bool
    ) -> masking.TokenIds:
        """Draws the same visible patches, and skips none of the masked ones.

        Weights are known of the images of training only; here all patches count alike.

        Args:
          throw: as many as in training are decoded and all others thrown; otherwise
            all are decoded.
        """
        num_keep, num_pred, _ = self.counts
        num_masked = self.num_patches - num_keep
        num_pred = num_pred if throw else num_masked
        counts = masking.TokenCounts(num_keep, num_pred, num_masked - num_pred)
        sampler = self
        if self.noise is masking.weighted:
            sampler = dataclasses.replace(self, noise=masking.uniform)
        return sampler._cut(counts, key, batch)

    def some(self) -> masking.TokenIds:
        """Returns patches of one sample, for shapes: whatever the noise looks at."""
        return dataclasses.replace(self, noise=masking.uniform).draw(
            jax.random.key(0), {"sample": jnp.zeros(1, jnp.uint32)}
        )

    def _cut(self, counts, key, batch):
        """Draws units, and where they do not stay whole, patches of masked ones."""
        area, furthest = self.unit**2, self.retain == "furthest"
        num_units = self.num_patches // area
        noise = self.noise(key, batch, num=num_units)
        parted = counts.num_keep + counts.num_pred < self.num_patches
        if self.throw_by == "unit" or self.unit == 1 or not parted:
            units = masking.TokenCounts(*(num // area for num in counts))
            columns = self.grid[1] // self.unit if furthest else None
            ids = masking.token_ids(noise, units, columns=columns)
            return ids if self.unit == 1 else self._expanded(ids)
        num_keep = counts.num_keep // area
        units = masking.TokenCounts(num_keep, num_units - num_keep, 0)
        keep = self._expanded(masking.token_ids(noise, units)).keep
        visible = masking.mask_of(keep, num_patches=self.num_patches)
        # Another draw of the same kind, for the patches of masked units.
        key = jax.random.fold_in(key, _PATCHES)
        noise = self.noise(key, batch, num=self.num_patches)
        noise = jnp.maximum(noise, jnp.finfo(noise.dtype).min)
        ids = masking.token_ids(
            jnp.where(visible, -jnp.inf, noise), counts,
            columns=self.grid[1] if furthest else None,
        )
        return ids._replace(keep=keep)

    def _expanded(self, ids):
        return masking.expanded(ids, unit=self.unit, grid=self.grid)
