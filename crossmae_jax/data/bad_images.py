"""What happens to images that cannot be decoded: noted, counted, and limited.

One damaged file must not end a run of days, and a damaged data set must not pass
unnoticed. Every file is written once to `bad_images.jsonl`, one JSON object a line:
its name, the reason, its index in the source and the sample it was met in. A workdir
has one list, which outlives a launch and is that of training and of all evaluations:
a file that stands in it already is not written again.
"""

import json
import os
from typing import NamedTuple

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
                f"one is {bad[-1].reason}. All are listed in {where}. Repair or remove "
                "them, or raise data.max_bad_share."
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
            self._listed.update(map(_name, lines))
            if image.name not in self._listed:
                if lines and not lines[-1].endswith(b"\n"):
                    file.write(b"\n")
                file.write(json.dumps(image._asdict()).encode() + b"\n")
                self._listed.add(image.name)
            self._read_bytes = file.tell()


def listed(workdir: str | os.PathLike) -> set[str]:
    """Returns the names of all bad images that a workdir lists, of all processes."""
    files = [
        os.path.join(workdir, name) for name in os.listdir(workdir)
        if name.startswith("bad_images") and name.endswith(".jsonl")
    ]
    names = set()
    for path in files:
        with open(path, "rb") as file:
            names.update(map(_name, file))
    return names - {None}


def _name(line: bytes) -> str | None:
    """Returns whose line of the list it is; None of one that a killed run cut short."""
    try:
        return json.loads(line)["name"]
    except ValueError:
        return None
