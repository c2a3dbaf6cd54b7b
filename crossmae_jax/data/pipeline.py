"""From a source to batches: order, augmentation, substitutes, prefetching.

Samples s = 0, 1, 2, ... are counted over the whole run; with n images

    epoch, position = divmod(s, n)
    image           = permutation(seed, epoch)[position]
    crop, flip, ... = drawn from Philox(key=(seed, s))

so a batch is a function of (seed, step) alone: the same for any number of workers,
threads and hosts. A restart at step t is a start at sample t * batch_size; there is no
iterator state to save or to lose.

A batch is cut into chunks of at most 64 images. Workers turn chunk numbers into decoded
chunks, in order (`workers`), and the parent joins them to batches: that is why the
number of workers cannot change a batch.

An image that cannot be read or decoded is replaced by the next one in the source that
can be, with the sample's own crop; `bad_images` notes and limits that.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from crossmae_jax.data import randaug, transforms, workers
from crossmae_jax.data.bad_images import Bad, BadImages, TooManyBadImages
from crossmae_jax.data.sources import Source

Batch = dict[str, np.ndarray]

_CHUNK_IMAGES = 64
_CHUNK_BYTES = 4 << 20
_BATCHES_AHEAD = 2
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
) -> "Batches":
    """Yields the training batches of steps start_step .. start_step + num_steps - 1.

    Args:
      process_index: which contiguous slice of every global batch is yielded.
      workdir: where `bad_images.jsonl` goes; nowhere when None.

    Returns:
      An iterator of {"image": u8[b height width c], "label": i32[b], "sample": u32[b]}.
    """
    _check_not_empty(source)
    if seed < 0:
        raise ValueError(f"seed={seed}; expected 0 or more.")
    if data.crop not in transforms.CROPS:
        raise ValueError(
            f"Unknown data.crop {data.crop!r}. Known: {', '.join(transforms.CROPS)}."
        )
    local = _Slice.of(data.batch_size, start_step, process_index, process_count)
    augment = functools.partial(
        _train_image,
        seed=seed,
        image_size=tuple(data.image_size),
        channels=data.channels,
        crop=data.crop,
        crop_scale=tuple(float(share) for share in data.crop_scale),
        flip=data.flip,
        randaug=randaug.from_config(data),
    )
    order = functools.partial(_shuffled, num_images=len(source), seed=seed)
    loader = _Loader(source, local, order, augment, _pixels(data))
    bad_images = BadImages(len(source), data.max_bad_share, workdir, process_index)
    return Batches(
        loader, num_steps, data.workers, bad_images, ("image", "label", "sample")
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
) -> "Batches":
    """Yields every image once, in order; the last batch is padded.

    Args:
      num_images: only so many images, spread evenly over the source.

    Returns:
      An iterator of {"image": u8[b height width c], "label": i32[b], "valid": bool[b],
      "sample": u32[b]}; sample is the index in the source. Padding is black, with label
      -1 and sample 0.
    """
    _check_not_empty(source)
    count = len(source) if num_images is None else min(num_images, len(source))
    local = _Slice.of(batch_size, 0, process_index, process_count)
    if not 0 < data.eval_crop_ratio <= 1:
        raise ValueError(
            f"config.data.eval_crop_ratio={data.eval_crop_ratio} must lie between 0 "
            "and 1; it is the share of the resized image's side that is kept."
        )
    prepare = functools.partial(
        _eval_image,
        image_size=tuple(data.image_size),
        channels=data.channels,
        crop_ratio=data.eval_crop_ratio,
    )
    order = functools.partial(_evenly, num_images=len(source), count=count)
    loader = _Loader(source, local, order, prepare, _pixels(data), by_index=True)
    bad_images = BadImages(len(source), data.max_bad_share, workdir, process_index)
    keys = ("image", "label", "valid", "sample")
    return Batches(loader, -(-count // batch_size), data.workers, bad_images, keys)


def blank_batch(data: ConfigDict, *, batch_size: int, valid: bool = False) -> Batch:
    """Returns zeros, in no memory, with the shapes and types of a global batch.

    Args:
      valid: of evaluation, which has an array more.
    """
    shapes = {
        "image": ((batch_size, *data.image_size, data.channels), np.uint8),
        "label": ((batch_size,), np.int32),
        **({"valid": ((batch_size,), np.bool_)} if valid else {}),
        "sample": ((batch_size,), np.uint32),
    }
    return {
        name: np.broadcast_to(np.zeros((), dtype), shape)
        for name, (shape, dtype) in shapes.items()
    }


class Batches(Iterator[Batch]):
    """Batches that are made ahead of their use, a bounded number of them.

    Attributes:
      wait_seconds: how long next() had to wait, in total.
      num_workers: worker processes; 0 means threads of this process.
    """

    def __init__(
        self,
        loader: "_Loader",
        num_batches: int,
        num_workers: int,
        bad_images: BadImages,
        keys: tuple[str, ...],
    ):
        self.wait_seconds = 0.0
        self._bad_images = bad_images
        self._keys = keys
        num_chunks = num_batches * loader.chunks_per_batch
        self.num_workers, chunks = workers.start(
            loader,
            num_chunks=num_chunks,
            num_images=num_batches * loader.local.size,
            chunk_bytes=loader.chunk_bytes,
            num_workers=num_workers,
        )
        self._remaining = num_batches
        self._joiner = _Joiner(loader, chunks)
        # One thread, so that batches are joined in order.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "crossmae-batches")
        self._ahead: collections.deque = collections.deque()
        self._close = weakref.finalize(self, _shut, self._pool, self._joiner)
        for _ in range(_BATCHES_AHEAD):
            self._request()

    @property
    def num_bad(self) -> int:
        """Samples so far whose image was replaced."""
        return self._bad_images.count

    def __next__(self) -> Batch:
        if not self._ahead:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            batch, bad = self._ahead.popleft().result()
            self.wait_seconds += time.perf_counter() - start
            self._bad_images.add(len(batch["label"]), bad)
        except BaseException:
            self.close()
            raise
        self._request()
        return {key: batch[key] for key in self._keys}

    def close(self) -> None:
        """Stops threads and worker processes; a second call does nothing."""
        self._ahead.clear()
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _request(self) -> None:
        if self._remaining > 0:
            self._remaining -= 1
            self._ahead.append(self._pool.submit(self._joiner))


def _shut(pool: concurrent.futures.Executor, joiner: "_Joiner") -> None:
    joiner.stop.set()
    pool.shutdown(wait=True, cancel_futures=True)
    joiner.chunks.close()
    joiner.chunks = None  # Grain's iterators complain when the interpreter ends first


@dataclasses.dataclass
class _Joiner:
    """Joins the next chunks to a batch; runs in the thread of `Batches`."""

    loader: "_Loader"
    chunks: Any
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __call__(self) -> tuple[Batch, list[Bad]]:
        size = self.loader.local.size
        batch = {
            "image": np.empty((size, *self.loader.pixels), np.uint8),
            "label": np.empty(size, np.int32),
            "sample": np.empty(size, np.uint32),
            "valid": np.empty(size, bool),
        }
        bad: list[Bad] = []
        for part in range(self.loader.chunks_per_batch):
            if self.stop.is_set():
                raise concurrent.futures.CancelledError
            begin, end = self.loader.bounds(part)
            chunk = next(self.chunks)
            batch["image"][begin:end] = chunk["image"]
            for key in ("label", "sample", "valid"):
                batch[key][begin:end] = getattr(chunk["notes"], key)
            bad.extend(chunk["notes"].bad)
        return batch, bad


@dataclasses.dataclass(frozen=True)
class _Notes:
    """What a chunk says about its pixels; no tree, so that it travels as one object."""

    label: np.ndarray
    sample: np.ndarray
    valid: np.ndarray
    bad: list[Bad]


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
    """Chunk number -> decoded chunk; runs in the workers."""

    source: Source
    local: _Slice
    order: Callable[[int], int]
    transform: Callable[..., np.ndarray]
    pixels: tuple[int, int, int]
    by_index: bool = False

    @functools.cached_property
    def chunks_per_batch(self) -> int:
        fits = max(1, _CHUNK_BYTES // int(np.prod(self.pixels)))
        return -(-self.local.size // min(_CHUNK_IMAGES, fits))

    @property
    def chunk_bytes(self) -> int:
        images = -(-self.local.size // self.chunks_per_batch)
        return images * int(np.prod(self.pixels))

    def bounds(self, part: int) -> tuple[int, int]:
        """Where a chunk begins and ends in the local batch."""
        size, parts = self.local.size, self.chunks_per_batch
        return part * size // parts, (part + 1) * size // parts

    def __call__(self, chunk: int) -> dict[str, Any]:
        step, part = divmod(chunk, self.chunks_per_batch)
        begin, end = self.bounds(part)
        first = (self.local.start_step + step) * self.local.batch_size
        first += self.local.first
        images = np.zeros((end - begin, *self.pixels), np.uint8)
        label = np.full(end - begin, -1, np.int32)
        number = np.zeros(end - begin, np.uint64)
        valid = np.zeros(end - begin, bool)
        bad: list[Bad] = []
        for row, sample in enumerate(range(first + begin, first + end)):
            index = self.order(sample)
            if index >= 0:
                images[row], label[row] = self._load(sample, index, bad)
                number[row] = index if self.by_index else sample
                valid[row] = True
        # Sample numbers wrap after 4 billion, in the batch only.
        notes = _Notes(label, number.astype(np.uint32), valid, bad)
        return {"image": images, "notes": notes}

    def _load(self, sample: int, index: int, bad: list[Bad]) -> tuple[np.ndarray, int]:
        for attempt in range(min(_SUBSTITUTES, len(self.source))):
            at = (index + attempt) % len(self.source)
            try:
                record = self.source[at]
                pixels = self.transform(record["image"], sample, name=record["name"])
                return pixels, record["label"]
            except transforms.BadImage as error:
                reason = str(error)
            except OSError as error:
                reason = f"{self.source.name(at)}: {type(error).__name__}: {error}"
            bad.append(Bad(self.source.name(at), reason, at, sample))
        raise TooManyBadImages(
            f"{attempt + 1} images in a row cannot be decoded. The last one is "
            f"{reason}. Check the data set: {self.source!r}."
        )


def _train_image(image: Any, sample: int, *, seed: int, **kwargs: Any) -> np.ndarray:
    rng = np.random.Generator(_philox(seed, sample, stream=1))
    return transforms.train_image(image, rng, **kwargs)


def _eval_image(image: Any, sample: int, **kwargs: Any) -> np.ndarray:
    return transforms.eval_image(image, **kwargs)


def _shuffled(sample: int, *, num_images: int, seed: int) -> int:
    """The image of a training sample: a new permutation every epoch."""
    epoch, position = divmod(sample, num_images)
    return int(_permutation(num_images, seed, epoch)[position])


def _evenly(sample: int, *, num_images: int, count: int) -> int:
    """The image of an evaluation sample; -1 is padding."""
    return sample * num_images // count if sample < count else -1


@functools.lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    # Raw bits are sorted because NumPy promises a stable stream of bits, but not that
    # permutation() will always make the same use of it.
    bits = _philox(seed, epoch, stream=0).random_raw(num_images)
    return np.argsort(bits, kind="stable").astype(np.uint32)


def _philox(seed: int, number: int, *, stream: int) -> np.random.Philox:
    """Bits for (seed, number); `stream` keeps permutations and crops apart."""
    return np.random.Philox(
        key=np.array([seed, number], np.uint64),
        counter=np.array([0, 0, 0, stream], np.uint64),
    )


def _pixels(data: ConfigDict) -> tuple[int, int, int]:
    return (*data.image_size, data.channels)


def _check_not_empty(source: Source) -> None:
    if len(source) == 0:
        raise ValueError(f"{source!r} has no images; expected at least one.")
