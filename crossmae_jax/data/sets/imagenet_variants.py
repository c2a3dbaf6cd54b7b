"""ImageNet-A, -R, -Sketch and -C from the folders that their archives unpack to.

    ImageNet-A, -R, -Sketch    DIR/n01440764/*.jpg
    ImageNet-C                 DIR/gaussian_noise/1/n01440764/*.JPEG

The folders are named by WordNet id. Labels are 0 to 999 for each set, places among the
sorted 1000 ids of ImageNet-1k, as of a model that was trained on it. -A and -R have 200
classes each, of which they share 86: which ones, the folders say.

Nothing is left to a broken download: the numbers of classes and images, and the sum,
first and last of the class numbers must be those of the whole set. A test compares
sums and ends with the lists in timm 1.0 (`imagenet_a_indices.txt`,
`imagenet_r_indices.txt`).

TFDS has the same sets with the same labels, in its own form (`tfds_source`):
`imagenet_a`, `imagenet_r` and `imagenet_sketch`, split "test". Its
`imagenet2012_corrupted/NAME_SEVERITY`, split "validation", is made from ImageNet anew,
with other crops and noise than the JPEGs of ImageNet-C.
"""

import functools
import os
from typing import NamedTuple

from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from crossmae_jax.data.folder_source import FolderSource
from crossmae_jax.data.sets import corruptions


class _Whole(NamedTuple):
    """What a set has when nothing is missing."""

    name: str
    num_images: int
    num_classes: int = 1000
    sum_of_classes: int = 499_500
    first: tuple[int, ...] = (0, 1, 2)
    last: tuple[int, ...] = (997, 998, 999)


_A = _Whole("ImageNet-A", 7_500, 200, 102_178, (6, 11, 13), (986, 987, 988))
_R = _Whole("ImageNet-R", 30_000, 200, 86_135, (1, 2, 4), (981, 983, 988))
_SKETCH = _Whole("ImageNet-Sketch", 50_889)
_C = _Whole("ImageNet-C", 50_000)


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
    """Returns the ids of the 1000 classes in their order, which is sorted.

    They come with TFDS, as the labels of its `imagenet2012`.
    """
    with open(imagenet_common.label_names_file(), encoding="ascii") as file:
        return tuple(file.read().split())


def imagenet_a(directory: str) -> FolderSource:
    """Opens ImageNet-A (arXiv 1907.07174), 7,500 images of 200 classes.

    Raises:
      ValueError: if the folders are not those of the whole set.
    """
    return _open(directory, _A)


def imagenet_r(directory: str) -> FolderSource:
    """Opens ImageNet-R (arXiv 2006.16241), 30,000 images of 200 classes.

    Raises:
      ValueError: if the folders are not those of the whole set.
    """
    return _open(directory, _R)


def imagenet_sketch(directory: str) -> FolderSource:
    """Opens ImageNet-Sketch (arXiv 1905.13549), 50,889 images of all classes.

    Raises:
      ValueError: if the folders are not those of the whole set.
    """
    return _open(directory, _SKETCH)


def imagenet_c(directory: str, *, corruption: str, severity: int) -> FolderSource:
    """Opens one of the 75 sets of ImageNet-C (arXiv 1903.12261), 50,000 images.

    The images are 224 x 224 already and are not to be enlarged and cropped: evaluate
    with data.eval_crop_ratio=1.0. With data.image_size=(224, 224) they then reach the
    model as they are stored, and a model of another size gets the whole image resized.

    Args:
      directory: holds the folders of the corruptions, out of all archives.
      corruption: one of `corruptions.CORRUPTIONS`.
      severity: one of `corruptions.SEVERITIES`.

    Raises:
      ValueError: for another corruption or severity, or if the folders are not those of
        the whole set.
    """
    corruptions.check(corruption, severity)
    below = os.path.join(os.path.expanduser(directory), corruption, str(severity))
    if not os.path.isdir(below):
        raise ValueError(
            f"{below} does not exist; expected {_C.name} as "
            "DIR/CORRUPTION/SEVERITY/WORDNET_ID/*.JPEG, the folders of noise.tar, "
            "blur.tar, weather.tar and digital.tar side by side. Found in "
            f"{directory}: {_some(_folders(directory))}."
        )
    return _open(below, _C._replace(name=f"{_C.name} {corruption} {severity}"))


def _open(directory: str, whole: _Whole) -> FolderSource:
    folders = _folders(directory)
    number = {name: k for k, name in enumerate(wordnet_ids())}
    unknown = [name for name in folders if name not in number]
    if unknown or not folders:
        raise ValueError(
            f"{directory} should hold {whole.name} in folders named by WordNet id, "
            f"such as {wordnet_ids()[whole.first[0]]}, and no other; it holds "
            f"{_some(unknown)}. Give the directory right above the class folders."
        )
    classes = sorted(number[name] for name in folders)
    counted = (len(classes), sum(classes), tuple(classes[:3]), tuple(classes[-3:]))
    if counted != whole[2:]:
        raise ValueError(
            f"{directory} is not the whole of {whole.name}: {_described(*counted)}; "
            f"expected {_described(*whole[2:])}. The download is incomplete, or this "
            "is another set."
        )
    # What is missing is counted below.
    source = FolderSource(directory, classes=wordnet_ids(), max_skipped_share=1.0)
    if len(source) != whole.num_images or not source.classes:
        place = "" if source.classes else ", some of them outside of its classes"
        raise ValueError(
            f"{directory} is not the whole of {whole.name}: {len(source):,} images"
            f"{place}; expected {whole.num_images:,} in the folders of its classes. "
            "Download and unpack it again."
        )
    return source


def _folders(directory: str) -> list[str]:
    """Returns the names of the folders in a directory, sorted."""
    directory = os.path.expanduser(directory)
    if not os.path.isdir(directory):
        what = "is a file" if os.path.exists(directory) else "does not exist"
        raise ValueError(f"{directory} {what}; expected a directory of images.")
    with os.scandir(directory) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "no folders") + rest


def _described(
    count: int, total: int, first: tuple[int, ...], last: tuple[int, ...]
) -> str:
    ends = f"{', '.join(map(str, first))} to {', '.join(map(str, last))}"
    return f"{count} classes, numbers {ends} with the sum {total}"
