"""What happens to images that cannot be decoded: noted, counted, and limited.

One damaged file must not end a run of days, and a damaged data set must not pass
unnoticed. Every file is written once to `bad_images.jsonl`, one JSON object a line:
its name, the reason, its index in the source and the sample it was met in. A workdir
has one list, which outlives a launch and is that of training and of all evaluations:
a file that stands in it already is not written again. A launch that goes on counts on
from what the list tells of those before.
"""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from crossmae_jax import errors

_UNIT = 10_000  # samples


class TooManyBadImages(errors.UserError, RuntimeError):
    """More images than the configuration allows cannot be decoded.

    Attributes:
      reason: what is wrong with the last one, and its name.
    """

    reason = ""


class Bad(NamedTuple):
    """One image that had to be replaced."""

    name: str
    reason: str
    index: int
    sample: int


class BadImages:
    """Counts and notes bad images, and raises above a share of the samples seen.

    The share is taken of whole epochs (of 10,000 samples where an epoch is longer), the
    one under way included, so that early luck does not decide. A single file alone
    never stops a run, unless max_share is 0.

    Args:
      num_images: how many images the source has.
      max_share: data.max_bad_share.
      workdir: where the list goes; nowhere when None.
      process_index: of several processes each has a list of its own, and judges by it.
    """

    def __init__(
        self,
        num_images: int,
        max_share: float,
        workdir: str | None,
        process_index: int = 0,
    ):
        self.count = 0
        self._seen = 0
        self._noted: set[int] = set()
        self._num_images = num_images
        self._max_share = max_share
        self._listed: set[str] = set()  # names in the first so many bytes of the list
        self._read_bytes = 0
        self._path = None
        if workdir is not None:
            which = f".process_{process_index}" if process_index else ""
            self._path = os.path.join(workdir, f"bad_images{which}.jsonl")

    def resume(
        self, source: Any, num_samples: int, times: Callable[[int], int]
    ) -> None:
        """Takes up the counts of earlier launches, as far as the list has them.

        Args:
          source: of the training images; the list may have others, of evaluations.
          num_samples: how many samples these launches saw.
          times: image -> how many of these samples were that image.
        """
        self._seen = num_samples
        for image in self._images():
            known = 0 <= image.index < len(source)
            if not known or source.name(image.index) != image.name:
                continue
            if met := times(image.index):
                self.count += met
                self._noted.add(image.index)

    def add(self, num_samples: int, bad: list[Bad]) -> None:
        """Accounts for a batch and the images that were replaced in it."""
        self._seen += num_samples
        if not bad:
            return
        self.count += len({image.sample for image in bad})
        for image in bad:
            if image.index not in self._noted:
                self._noted.add(image.index)
                self._note(image)
        unit = min(self._num_images, _UNIT)
        judged = -(-self._seen // unit) * unit
        allowed = self._max_share * judged
        single = len(self._noted) == 1 and self._max_share > 0
        if self.count > allowed and not single:
            where = self._path or "the warnings above"
            error = TooManyBadImages(
                f"{self.count} of {self._seen} samples met images that cannot be "
                f"decoded ({len(self._noted)} files); data.max_bad_share="
                f"{self._max_share:g} allows {allowed:g} in {judged} samples. The last "
                f"one is {bad[-1].reason}. All are listed in {where}. Repair them and "
                "then remove that list, or raise data.max_bad_share."
            )
            error.reason = bad[-1].reason
            raise error

    def _note(self, image: Bad) -> None:
        logging.warning("Replaced an image that cannot be decoded: %s", image.reason)
        if self._path is None:
            return
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "a+b") as file:
            # Read anew: training and evaluations write into it by turns.
            file.seek(self._read_bytes)
            lines = file.read().splitlines(keepends=True)
            self._listed.update(image.name for image in map(_image, lines) if image)
            if image.name not in self._listed:
                if lines and not lines[-1].endswith(b"\n"):
                    file.write(b"\n")
                file.write(json.dumps(image._asdict()).encode() + b"\n")
                self._listed.add(image.name)
            self._read_bytes = file.tell()

    def _images(self) -> list[Bad]:
        """Returns the list, each file once."""
        if self._path is None or not os.path.exists(self._path):
            return []
        with open(self._path, "rb") as file:
            images = filter(None, map(_image, file.read().splitlines()))
        return list({image.name: image for image in images}.values())


def listed(workdir: str | os.PathLike) -> set[str]:
    """Returns the names of all bad images that a workdir lists, of all processes."""
    files = [
        os.path.join(workdir, name) for name in os.listdir(workdir)
        if name.startswith("bad_images") and name.endswith(".jsonl")
    ]
    names = set()
    for path in files:
        with open(path, "rb") as file:
            names.update(image.name for image in map(_image, file) if image)
    return names


def _image(line: bytes) -> Bad | None:
    """Returns what a line of the list says; None of one that was cut short or edited.
    """
    try:
        image = Bad(**json.loads(line.decode()))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = isinstance(image.index, int) and isinstance(image.sample, int)
    return image if numbers and isinstance(image.name, str) else None
