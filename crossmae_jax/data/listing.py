"""What a folder holds: images, and what is left aside, and why.

Files are known by the endings of their names; none is opened. What is no regular file,
such as a pipe, whose reader may wait for ever, is none. What is read are
`EXTENSIONS`. Pictures of other kinds, and files without an ending, may be images that
somebody counts on: where more of them than a share are skipped, or all of a class, that
is an error. Other files, such as labels beside the images, are counted and no more.
"""

import collections
import math
import os
from collections.abc import Collection
from typing import NamedTuple

from crossmae_jax import paths

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm",
    ".pgm", ".pbm", ".pnm",
)
_ENDINGS = tuple(os.fsencode(extension) for extension in EXTENSIONS)
# Images that are not read, for want of a decoder or of one picture in them.
_UNREAD = frozenset((
    "", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".eps", ".exr", ".gif",
    ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".nef",
    ".orf", ".pcx", ".pfm", ".psd", ".raf", ".raw", ".rw2", ".sgi", ".svg", ".tga",
))
_SHOWN = 5
_SPLITS = (
    ("train", "training"),
    ("val", "validation", "valid", "eval", "dev", "test", "testing"),
)


class Listing(NamedTuple):
    """The files below a directory, by their first-level folders, b"" of none.

    Attributes:
      images: their paths below it, sorted by bytes.
      classes: the folders of images.
      others: how many other files there are, by (folder, ending).
      folders: all folders, but links to what was read before.
      hidden: how many files and folders have names that begin with a dot.
      special: how many pipes, sockets and devices there are, whatever their names.
    """

    images: list[bytes]
    classes: frozenset[bytes]
    others: collections.Counter
    folders: frozenset[bytes]
    hidden: int
    special: int

    @classmethod
    def of(
        cls, images: list[bytes], others: collections.Counter, folders: set[bytes],
        hidden: int, special: int = 0,
    ) -> "Listing":
        """Sorts what was come across in any order."""
        classes = frozenset(map(_folder, images))
        return cls(
            sorted(images), classes, others, frozenset(folders), hidden, special
        )


def listed(directory: str) -> Listing:
    """Lists a directory, on a disk or in a bucket; see `folder_source.FolderSource`.

    Raises:
      ValueError: if it does not exist.
    """
    if paths.is_remote(directory):
        return _list(directory)
    return _walk(directory)


def check(directory: str, listing: Listing, *, max_skipped_share: float) -> None:
    """Refuses folders of which images would be missing, or whose folders are splits.

    A single file alone is never too much, unless max_skipped_share is 0.

    Raises:
      ValueError: if there are no images, if there are folders of training and of
        evaluation, or if more than the share of all images, or of those of a class that
        thereby vanishes, are of a kind that is not read.
    """
    if not 0 <= max_skipped_share <= 1:
        raise ValueError(
            f"max_skipped_share={max_skipped_share:g} must lie between 0 and 1; it is "
            "the share of a folder's images that may be of a kind that is not read."
        )
    if not listing.images:
        instead = [_counted(_endings(listing.others)), _special(listing)]
        raise ValueError(
            f"No images under {directory}. Looked for {' '.join(EXTENSIONS)}. Found "
            f"instead: {', '.join(filter(None, instead)) or 'no files at all'}."
        )
    _check_splits(directory, listing)
    unread = collections.Counter({
        where: count for where, count in listing.others.items()
        # Downloads leave .jpg_large, .jpg?w=640 and .jpg~ behind.
        if where[1] in _UNREAD or where[1].startswith(EXTENSIONS)
    })
    least = 1 if max_skipped_share else 0
    total = unread.total() + len(listing.images)
    share = unread.total() / total
    refused = []
    if unread.total() > least and share > max_skipped_share:
        refused.append(f"{unread.total()} of {total} images")
    lost = {
        folder: count for folder, count in _unclassed(listing, unread).items()
        if count > least and max_skipped_share < 1
    }
    if lost:
        share = 1.0
        refused.append(f"all images of {_named(lost)}, which would be no class then,")
    if refused:
        raise ValueError(
            f"{directory}: {' and '.join(refused)} are of a kind that is not read "
            f"({_counted(_endings(unread))}), more than max_skipped_share="
            f"{max_skipped_share:g}. Read are {' '.join(EXTENSIONS)}. Convert or "
            "rename them, or accept it: --config.data.max_skipped_share="
            f"{math.ceil(100 * share) / 100:g} (a command without --config: "
            "--max_skipped_share)."
        )


def skipped(listing: Listing) -> str:
    """Returns what of a folder is left aside, and why; "" if nothing is."""
    parts = []
    if endings := _endings(listing.others):
        parts.append(f"{_counted(endings)} (no kind of image that is read)")
    if listing.special:
        parts.append(_special(listing))
    if listing.hidden:
        parts.append(f"{listing.hidden} whose names begin with a dot")
    empty = _unclassed(listing, listing.others)
    if empty:
        parts.append(f"no class of {_named(empty)}, without an image that is read")
    return ", ".join(parts)


def _special(listing: Listing) -> str:
    files = f"{listing.special} pipes, sockets or devices (no regular files)"
    return files if listing.special else ""


def _unclassed(listing: Listing, others: collections.Counter) -> dict[bytes, int]:
    """Returns folders that are no classes beside others, and their files in `others`.

    None where there are no classes, because images lie in no folder.
    """
    if b"" in listing.classes:
        return {}
    counts = dict.fromkeys(sorted(listing.folders - listing.classes), 0)
    for (folder, _), count in others.items():
        if folder in counts:
            counts[folder] += count
    return counts


def _check_splits(directory: str, listing: Listing) -> None:
    named = {os.fsdecode(folder).lower(): folder for folder in listing.classes}
    train, held_out = (
        next((os.fsdecode(named[name]) for name in names if name in named), None)
        for names in _SPLITS
    )
    if train is None or held_out is None:
        return
    train, held_out = (os.path.join(directory, name) for name in (train, held_out))
    raise ValueError(
        f"{directory} holds {train} and {held_out}, which are splits of a data set and "
        f"no classes. Give each by itself: --config.data.dir={train} "
        f"--config.data.eval_dir={held_out}."
    )


def _endings(others: collections.Counter) -> collections.Counter:
    endings = collections.Counter()
    for (_, ending), count in others.items():
        endings[ending] += count
    return endings


def _counted(endings: collections.Counter) -> str:
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    counts = [f"{count} {ending or 'without extension'}" for ending, count in most]
    if len(endings) > _SHOWN:
        counts.append(f"{endings.total()} files in all")
    return ", ".join(counts)


def _named(folders: Collection[bytes]) -> str:
    names = [repr(os.fsdecode(folder)) for folder in sorted(folders)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(_ENDINGS)


def _folder(path: bytes) -> bytes:
    folder, slash, _ = path.partition(b"/")
    return folder if slash else b""


def _ending(path: bytes) -> str:
    return os.fsdecode(os.path.splitext(path)[1].lower())


def _list(directory: str) -> Listing:
    bucket = paths.system(directory)
    root = directory.removeprefix("gs://") + "/"
    images, others = [], collections.Counter()
    folders, hidden = set(), set()
    names = bucket.find(directory)
    if not names or names == [root[:-1]]:
        what = "is an object" if names else "does not exist"
        raise ValueError(f"{directory} {what}; expected a folder of images.")
    for name in names:
        below = os.fsencode(name.removeprefix(root))
        parts = below.split(b"/")
        dotted = [part.startswith(b".") for part in parts]
        if True in dotted:
            hidden.add(b"/".join(parts[: dotted.index(True) + 1]))
            continue
        if len(parts) > 1:
            folders.add(parts[0])
        if _is_image(below):
            images.append(below)
        else:
            others[_folder(below), _ending(below)] += 1
    return Listing.of(images, others, folders, len(hidden))


def _walk(directory: str) -> Listing:
    if not os.path.isdir(directory):
        what = "is a file" if os.path.exists(directory) else "does not exist"
        raise ValueError(f"{directory} {what}; expected a directory of images.")
    root = os.fsencode(directory)
    images, others, folders = [], collections.Counter(), set()
    hidden, special = 0, 0
    seen: set[tuple[int, int]] = set()
    pending, links = [b""], []
    while pending or links:
        # Links wait until everything real is read, so that a real path wins.
        below = pending.pop() if pending else links.pop(0)
        here = os.path.join(root, below)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if below and b"/" not in below:
            folders.add(below)
        with os.scandir(here) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(b"."):
                hidden += 1
                continue
            path = os.path.join(below, entry.name)
            if entry.is_dir():
                (links if entry.is_symlink() else pending).append(path)
            elif not entry.is_file() and os.path.exists(entry):  # no broken link
                special += 1
            elif _is_image(entry.name):
                images.append(path)
            else:
                others[_folder(path), _ending(path)] += 1
    return Listing.of(images, others, folders, hidden, special)
