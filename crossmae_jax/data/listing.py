"""What a folder holds: images, and what is left aside, and why.

Files are known by the endings of their names; none is opened. What is no regular file,
such as a pipe, whose reader may wait for ever, is none. What is read are
`EXTENSIONS`. Pictures of other kinds, and files without an ending, may be images that
somebody counts on: where more of them than a share are skipped, that is an error. Other
files, such as labels beside the images, are counted and no more.

Folders beside class folders would be classes, if they had images: without one they
vanish, and later classes get other numbers. That is an error, too, unless all that they
hold are files that are neither images nor packed ones.
"""

import collections
import math
import os
import re
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
# What images of a class may still be packed in.
_PACKED = frozenset((
    ".7z", ".bz2", ".gz", ".h5", ".hdf5", ".lmdb", ".mat", ".npy", ".npz", ".pickle",
    ".pkl", ".rar", ".tar", ".tfrecord", ".tgz", ".xz", ".zip", ".zst",
))
_SHOWN = 5
# What folders of splits are called, and what else may stand in their names.
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "eval", "dev"),
    "test": ("test", "testing"),
}
_BESIDE = frozenset((
    "clean", "coco", "data", "dataset", "full", "ilsvrc", "image", "imagenet",
    "images", "img", "imgs", "set", "split",
))


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
      ValueError: if there are no images, if there are folders of several splits, if
        more than the share of all images are of a kind that is not read, or if a class
        folder has none that is read, unless the share is 1.
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
        where: count for where, count in listing.others.items() if _may_be_image(where)
    })
    total = unread.total() + len(listing.images)
    share = unread.total() / total
    refused = []
    if unread.total() > (1 if max_skipped_share else 0) and share > max_skipped_share:
        refused.append(
            f"{unread.total()} of {total} images are of a kind that is not read "
            f"({_counted(_endings(unread))}), more than max_skipped_share="
            f"{max_skipped_share:g}"
        )
    if (lost := _lost(listing)) and max_skipped_share < 1:
        share = 1.0
        refused.append(
            f"no image that is read lies in {_named(lost)}, which would be no class "
            "then, and later ones would have other numbers"
        )
    if refused:
        raise ValueError(
            f"{directory}: {'; '.join(refused)}. Read are {' '.join(EXTENSIONS)}, "
            "whose names do not begin with a dot. Convert, rename or unpack what is an "
            "image, and move away what is none; or accept it: "
            f"--config.data.max_skipped_share={math.ceil(100 * share) / 100:g} (a "
            "command without --config: --max_skipped_share)."
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
    if b"" not in listing.classes and (empty := listing.folders - listing.classes):
        parts.append(f"no class of {_named(empty)}, without an image that is read")
    return ", ".join(parts)


def stray(listing: Listing) -> str:
    """Names the images beside folders that would be classes; "" where none are."""
    beside = [image for image in listing.images if b"/" not in image]
    if not beside or len(listing.classes - {b""}) < 2:
        return ""
    return f"{_named(beside)} {'lies' if len(beside) == 1 else 'lie'} beside folders"


def _special(listing: Listing) -> str:
    files = f"{listing.special} pipes, sockets or devices (no regular files)"
    return files if listing.special else ""


def _lost(listing: Listing) -> frozenset[bytes]:
    """Returns folders that somebody may take for classes, without an image in them.

    None where there are no classes, because images lie in no folder.
    """
    if b"" in listing.classes:
        return frozenset()
    may_hold_images: dict[bytes, bool] = {}
    for where in listing.others:
        folder, ending = where
        may = _may_be_image(where) or ending in _PACKED
        may_hold_images[folder] = may_hold_images.get(folder, False) or may
    return frozenset(
        folder for folder in listing.folders - listing.classes
        if may_hold_images.get(folder, True)  # one without a file, too
    )


def _may_be_image(where: tuple[bytes, str]) -> bool:
    # Downloads leave .jpg_large, .jpg?w=640 and .jpg~ behind.
    return where[1] in _UNREAD or where[1].startswith(EXTENSIONS)


def _check_splits(directory: str, listing: Listing) -> None:
    """Refuses what lies above splits, be it several levels above."""
    above, names = b"", listing.classes
    while len(names) == 1 and b"" not in names:
        above = os.path.join(above, *names)
        below = (image[len(above) + 1 :] for image in listing.images)
        names = frozenset(map(_folder, below))
    found = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        if split := _split(name):  # of several the shortest
            path = os.path.join(os.fsencode(directory), above, name)
            found.setdefault(split, os.fsdecode(path))
    if len(found) < 2:
        return
    listed = " and ".join(found[split] for split in _SPLITS if split in found)
    train, rest = found.get("train"), "."
    if train is None:
        train, rest = "DIR", ", with DIR for the images to train on."
    raise ValueError(
        f"{directory} holds {listed}, which are splits of a data set and no classes. "
        f"Give each by itself: --config.data.dir={train} "
        f"--config.data.eval_dir={found.get('val') or found['test']}{rest}"
    )


def _split(name: bytes) -> str | None:
    """Returns which split a folder is of by its name, as train2017 or val_images."""
    words = re.findall("[a-z]+", os.fsdecode(name).lower())
    words = [word for word in words if word not in _BESIDE]
    return next((
        split for split, called in _SPLITS.items()
        if len(words) == 1 and words[0] in called
    ), None)


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
        if len(parts) > 1 and not dotted[0]:
            folders.add(parts[0])
        if True in dotted:
            hidden.add(b"/".join(parts[: dotted.index(True) + 1]))
            continue
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
