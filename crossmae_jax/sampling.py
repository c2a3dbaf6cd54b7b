"""The masks of a configuration: `config.masking` on a grid of patches."""

import dataclasses

from jaxtyping import Array, Key

from crossmae_jax import masking

RETAIN = ("furthest", "random")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws the masks of batches: `config.masking` on a grid of patches.

    Attributes:
      grid: rows and columns of patches.
      mask_ratio: share of all patches that is masked; likewise `pred_ratio`,
        `throw_ratio`: see `masking`.
      retain: which masked patches are decoded rather than thrown, one of `RETAIN`.
      noise: one of `masking.NOISES`.
      together: samples in a row that share a mask, with noise "shared".
      unit: patches along the side of what is masked as one.
      rounding: see `masking.token_counts`.

    Raises:
      ValueError: if these contradict each other.
    """

    grid: tuple[int, int]
    mask_ratio: float
    pred_ratio: float
    throw_ratio: float = 0.0
    retain: str = "random"
    noise: str = "uniform"
    together: int = 1
    unit: int = 1
    rounding: str = "floor"

    def __post_init__(self):
        for name, known in (("noise", masking.NOISES), ("retain", RETAIN)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"Unknown masking.{name} {value!r}. Known: {', '.join(known)}."
                )
        rows, columns = self.grid
        if self.unit < 1 or rows % self.unit or columns % self.unit:
            raise ValueError(
                f"masking.unit={self.unit} does not divide a grid of {rows}x{columns} "
                "patches into squares; give a common divisor of both sides."
            )
        if (self.noise == "shared") != (self.together > 1):
            raise ValueError(
                f"masking.together={self.together} with masking.noise={self.noise!r}: "
                "how many images share a mask is for noise='shared', and more than 1."
            )
        num_keep, num_pred, num_thrown = self.units
        if self.retain == "furthest" and num_pred == self.num_units - num_keep:
            raise ValueError(
                "masking.retain='furthest' chooses among the masked patches, but all "
                f"{num_pred} of them are decoded: {self.throwing}, or set "
                "retain='random'."
            )

    @property
    def num_units(self) -> int:
        """How many units there are."""
        return self.grid[0] * self.grid[1] // self.unit**2

    @property
    def units(self) -> masking.TokenCounts:
        """How many units are seen, decoded and thrown."""
        return masking.token_counts(
            self.num_units, mask_ratio=self.mask_ratio, pred_ratio=self.pred_ratio,
            throw_ratio=self.throw_ratio, rounding=self.rounding,
        )

    @property
    def counts(self) -> masking.TokenCounts:
        """How many patches are seen, decoded and thrown."""
        return masking.TokenCounts(*(num * self.unit**2 for num in self.units))

    @property
    def throwing(self) -> str:
        """What is thrown and how to throw more, for an error's text."""
        return (
            f"throw_ratio={self.throw_ratio} throws {self.counts.num_thrown} of "
            f"{self.grid[0] * self.grid[1]} patches; raise config.masking.throw_ratio"
        )

    def draw(self, key: Key[Array, ""], batch: masking.Batch) -> masking.TokenIds:
        """Draws visible, decoded and thrown patches of each sample, for training.

        Args:
          batch: "sample" holds a number per sample; weighted noise takes "weights".
        """
        return self._cut(self.units, key, batch)

    def draw_all(
        self, key: Key[Array, ""], batch: masking.Batch, *, throw: bool
    ) -> masking.TokenIds:
        """Draws the same visible patches, and skips none of the masked ones.

        Args:
          throw: as many as in training are decoded and all others thrown; otherwise
            all are decoded.
        """
        num_keep, num_pred, _ = self.units
        num_masked = self.num_units - num_keep
        num_pred = num_pred if throw else num_masked
        counts = masking.TokenCounts(num_keep, num_pred, num_masked - num_pred)
        return self._cut(counts, key, batch)

    def _cut(self, units, key, batch):
        options = {"together": self.together} if self.noise == "shared" else {}
        noise = masking.NOISES[self.noise](key, batch, num=self.num_units, **options)
        columns = self.grid[1] // self.unit if self.retain == "furthest" else None
        ids = masking.token_ids(noise, units, columns=columns)
        if self.unit == 1:
            return ids
        return masking.expanded(ids, unit=self.unit, grid=self.grid)
