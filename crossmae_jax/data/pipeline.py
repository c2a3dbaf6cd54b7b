"""From a source to batches: order, transform, substitutes, prefetching.

Which image a sample is and what is drawn for it are functions of (seed, sample)
(`order`), and samples are counted over the whole run. So a batch of a source is a
function of (seed, step) alone: the same for any number of workers, threads and hosts. A
restart at step t is a start at sample t * batch_size; there is no iterator state to
save or to lose.

What arrays a batch has, the transform of the configuration says (`transforms`): one for
each of its fields. Here two more are added, the number of each sample and, in
evaluation, whether it is one or padding.

A batch is cut into chunks of at most 64 images. Workers turn chunk numbers into decoded
chunks, in order (`workers`), and the parent joins them to batches (`batches`): that is
why the number of workers cannot change a batch.

An image that cannot be read or decoded is replaced by the next one in the source that
can be, with the sample's own draws; `bad_images` notes and limits that.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import errors
from crossmae_jax.data import order, sources, transforms
from crossmae_jax.data.activity import Activity
from crossmae_jax.data.bad_images import Bad, BadImages, TooManyBadImages
from crossmae_jax.data.batches import Batch, Batches, Replaced
from crossmae_jax.data.decoding import BadImage
from crossmae_jax.data.fields import Field
from crossmae_jax.data.sources import Source
from crossmae_jax.data.transforms import Transform

_CHUNK_IMAGES = 64
_CHUNK_BYTES = 4 << 20
_SUBSTITUTES = 20  # images in a row that may be bad


def train_batches(
    source: Source,
    data: ConfigDict,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    workdir: str | None = None,
    num_classes: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Batches:
    """Yields the training batches of steps start_step .. start_step + num_steps - 1.

    Args:
      process_index: which contiguous slice of every global batch is yielded.
      workdir: where `bad_images.jsonl` goes; nowhere when None.
      num_classes: every label must be below it; None where nothing learns from labels.
      stop: asked while a batch is waited for; see `batches.StoppedWaiting`.

    Returns:
      An iterator of {a field of the transform: its array [b ...], "sample": u32[b]}.
      Its next() raises SetupError for a label that is no class.
    """
    _check_not_empty(source)
    order.check_seed(seed)
    loader = _Loader(
        source,
        sources.transform_for(source, data),
        _Slice.of(data.batch_size, start_step, process_index, process_count),
        functools.partial(order.shuffled, num_images=len(source), seed=seed),
        seed=seed,
    )
    bad_images = BadImages(len(source), data.max_bad_share, workdir, process_index)
    bad_images.resume(source, start_step * loader.local.size, functools.partial(
        order.times_met, num_samples=start_step * data.batch_size,
        batch_size=data.batch_size, process=(process_index, process_count),
        num_images=len(source), seed=seed,
    ))
    return Batches(
        loader, num_steps, data.workers, bad_images, num_classes=num_classes, stop=stop
    )


def eval_batches(
    source: Source,
    data: ConfigDict,
    *,
    batch_size: int,
    num_images: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workdir: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> Batches:
    """Yields every image once, in order; the last batch is padded.

    Args:
      num_images: only so many images, spread evenly over the source.
      stop: as for `train_batches`.

    Returns:
      An iterator of {a field of the transform: its array [b ...], "valid": bool[b],
      "sample": u32[b]}; sample is the index in the source. Padding holds what the
      fields are filled with, and sample 0.
    """
    _check_not_empty(source)
    count = len(source) if num_images is None else min(num_images, len(source))
    loader = _Loader(
        source,
        sources.transform_for(source, data),
        _Slice.of(batch_size, 0, process_index, process_count),
        functools.partial(order.evenly, num_images=len(source), count=count),
        seed=None,
    )
    bad_images = BadImages(len(source), data.max_bad_share, workdir, process_index)
    return Batches(
        loader, -(-count // batch_size), data.workers, bad_images, stop=stop
    )


def blank_batch(data: ConfigDict, *, batch_size: int, valid: bool = False) -> Batch:
    """Returns padding, in no memory, with the shapes and types of a global batch.

    Args:
      valid: of evaluation, which has an array more.
    """
    fields = _all_fields(transforms.make(data), evaluation=valid)
    return {
        name: np.broadcast_to(
            np.array(field.fill, field.dtype), (batch_size, *field.shape)
        )
        for name, field in fields.items()
    }


def _all_fields(transform: Transform, *, evaluation: bool) -> dict[str, Field]:
    """Returns what a batch consists of: what the transform makes, and our numbers."""
    own_fields = {"valid": Field((), "bool", False), "sample": Field((), "uint32", 0)}
    if taken := sorted(own_fields.keys() & transform.fields.keys()):
        raise ValueError(
            f"{type(transform).__name__} has a field {taken[0]!r}, which is an array "
            "of every batch already; give it another name."
        )
    if not evaluation:
        del own_fields["valid"]
    return {**transform.fields, **own_fields}


class _Slice(NamedTuple):
    """Which samples of each global batch are this process's: `size` from `first` on."""

    batch_size: int
    start_step: int
    first: int
    size: int

    @classmethod
    def of(
        cls, batch_size: int, start_step: int, process_index: int, process_count: int
    ) -> "_Slice":
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} cannot be divided among {process_count} "
                "processes; expected a positive multiple."
            )
        size = batch_size // process_count
        return cls(batch_size, start_step, process_index * size, size)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Chunk number -> decoded chunk; runs in the workers.

    Attributes:
      image_of: sample -> index in the source; -1 is padding.
      seed: of what is drawn in training; None in evaluation, which draws nothing.
      activity: where is said which image is being read.
    """

    source: Source
    transform: Transform
    local: _Slice
    image_of: Callable[[int], int]
    seed: int | None
    activity: Activity = dataclasses.field(default_factory=Activity)

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """All arrays of a batch."""
        return _all_fields(self.transform, evaluation=self.seed is None)

    @functools.cached_property
    def chunks_per_batch(self) -> int:
        fits = max(1, _CHUNK_BYTES // self._sample_bytes)
        return -(-self.local.size // min(_CHUNK_IMAGES, fits))

    @property
    def chunk_bytes(self) -> int:
        samples = -(-self.local.size // self.chunks_per_batch)
        return samples * self._sample_bytes

    @property
    def _sample_bytes(self) -> int:
        return sum(field.num_bytes for field in self.fields.values())

    def bounds(self, part: int) -> tuple[int, int]:
        """Where a chunk begins and ends in the local batch."""
        size, parts = self.local.size, self.chunks_per_batch
        return part * size // parts, (part + 1) * size // parts

    def check_labels(self, batch: Batch, num_classes: int) -> None:
        """Raises SetupError if a label is none of so many classes; names its image."""
        outside = (batch["label"] < 0) | (batch["label"] >= num_classes)
        if outside.any():
            row = int(np.argmax(outside))
            name = self.source.name(self.image_of(int(batch["sample"][row])))
            raise errors.SetupError(
                f"{name} has label {batch['label'][row]}, which is none of the classes "
                f"0 to {num_classes - 1}, so nothing can be learnt from it. Train on a "
                "split whose images all have labels."
            )

    def empty(self, samples: int) -> Batch:
        """Arrays for so many samples, whatever the memory held before."""
        return {
            name: np.empty((samples, *field.shape), field.dtype)
            for name, field in self.fields.items()
        }

    def __call__(self, chunk: int) -> dict[str, Any]:
        step, part = divmod(chunk, self.chunks_per_batch)
        begin, end = self.bounds(part)
        first = (self.local.start_step + step) * self.local.batch_size
        first += self.local.first
        arrays = self.empty(end - begin)
        padding = {name: field.fill for name, field in self.fields.items()}
        bad: list[Bad] = []
        for row, sample in enumerate(range(first + begin, first + end)):
            index = self.image_of(sample)
            values = padding
            if index >= 0:
                values = self._load(sample, index, bad) | self._number(sample, index)
            for name, array in arrays.items():
                array[row] = values[name]
        return {"arrays": arrays, "bad": Replaced(bad)}

    def _number(self, sample: int, index: int) -> dict[str, Any]:
        if self.seed is None:
            return {"valid": True, "sample": index}
        return {"sample": sample % 2**32}  # wraps, in the batch only

    def _load(self, sample: int, index: int, bad: list[Bad]) -> dict[str, Any]:
        for attempt in range(min(_SUBSTITUTES, len(self.source))):
            at = (index + attempt) % len(self.source)
            rng = None if self.seed is None else order.draws(sample, seed=self.seed)
            self.activity.begin(at)
            try:
                return self._checked(self.transform(self.source[at], rng))
            except BadImage as error:
                reason = str(error)
            except OSError as error:
                reason = f"{self.source.name(at)}: {type(error).__name__}: {error}"
            bad.append(Bad(self.source.name(at), reason, at, sample))
        error = TooManyBadImages(
            f"{attempt + 1} images in a row cannot be decoded. The last one is "
            f"{reason}. Check the data set: {self.source!r}."
        )
        error.reason = reason
        raise error

    def _checked(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Refuses what NumPy would fit into arrays by repeating or rounding it."""
        for name, field in self.transform.fields.items():
            value = np.asarray(values[name])
            if value.shape != field.shape or value.dtype != field.dtype:
                raise TypeError(
                    f"{type(self.transform).__name__} made {name!r} of the type "
                    f"{value.dtype} and shape {value.shape}; its field promises "
                    f"{field.dtype} {field.shape}."
                )
        return values


def _check_not_empty(source: Source) -> None:
    if len(source) == 0:
        raise ValueError(f"{source!r} has no images; expected at least one.")
