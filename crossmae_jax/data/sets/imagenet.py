"""ImageNet-1k as TFDS's own `imagenet2012` set, prepared without TensorFlow.

The stock builder of TFDS does the work and decides everything that lands on disk:
names, version, features, splits, shards, the order of the records. It calls TensorFlow
for five small things, which are replaced here while it runs:

    look for a tar, open it, read labels     local files through `open`
    the buckets it shuffles 140 GB with      likewise
    22 CMYK JPEGs, 1 PNG to RGB JPEG         PIL, with TensorFlow's arithmetic

so the result is the set that TFDS with TensorFlow writes, and either reads the other's.
The 22 CMYK images are the exception: TensorFlow decodes them with its fast DCT, PIL
with the accurate one, which moves some values by one or two before they are re-encoded.
"""

import contextlib
import glob
import io
import os
import shutil
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.download import extractor

from crossmae_jax import errors, paths
from crossmae_jax.data import tfds_source
from crossmae_jax.data.sets import writing

NAME = "imagenet2012"
TARS = {
    "train": "ILSVRC2012_img_train.tar",
    "validation": "ILSVRC2012_img_val.tar",
}
NUM_IMAGES = {"train": 1_281_167, "validation": 50_000}


def prepare(
    manual_dir: str, data_dir: str, *, report: Callable[[str], None] = print
) -> str:
    """Writes `imagenet2012` in ArrayRecord form from the original tar files.

    Args:
      manual_dir: holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
      data_dir: where TFDS sets lie; the set becomes `data_dir/imagenet2012/5.1.0`.
      report: takes a line of text about what happens.

    Returns:
      The directory of the set.
    """
    if paths.is_remote(manual_dir) or paths.is_remote(data_dir):
        raise errors.SetupError(
            f"manual_dir={manual_dir!r} and data_dir={data_dir!r} must lie on a disk. "
            "Prepare the set there and copy it to the bucket: gcloud storage cp -r "
            "DATA_DIR/imagenet2012 gs://BUCKET/."
        )
    manual_dir, data_dir = map(os.path.expanduser, (manual_dir, data_dir))
    builder = tfds.builder_cls(NAME)(data_dir=data_dir)
    directory = os.fspath(builder.data_path)
    if builder.is_prepared():
        file_format = builder.info.file_format.value
        if file_format != "array_record":
            raise errors.SetupError(
                f"{directory} holds the set as {file_format}, which has no random "
                "access. Give another --data_dir for the ArrayRecord form."
            )
        report(f"{directory} is prepared already.")
        return directory
    sizes = {split: _tar_size(manual_dir, tar) for split, tar in TARS.items()}
    _check_room(data_dir, sum(sizes.values()))
    for split, tar in TARS.items():
        gib = sizes[split] / 2**30
        report(
            f"{split}: {os.path.join(manual_dir, tar)}, {gib:.1f} GiB; the full split "
            f"has {NUM_IMAGES[split]:,} images."
        )
    for left in glob.glob(os.path.join(data_dir, NAME, "incomplete.*")):
        report(f"{left} is left from a run that was killed, or another one is at work.")
    tfds.enable_progress_bar()
    with (
        tempfile.TemporaryDirectory() as downloads,
        contextlib.redirect_stdout(sys.stderr),
        _without_tensorflow(), writing.into(data_dir),
    ):
        try:
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
                file_format="array_record",
            )
        except tarfile.TarError as error:
            raise errors.SetupError(
                f"A tar file in {manual_dir} is damaged or incomplete ({error}). "
                "Compare its size and checksum with those of the download page."
            ) from error
    for split, number in NUM_IMAGES.items():
        written = builder.info.splits[split].num_examples
        shards = builder.info.splits[split].num_shards
        note = "" if written == number else f" (the full split has {number:,})"
        report(f"{split}: {written:,} images{note} in {shards} shards.")
    report(f"Wrote {directory}.")
    return directory


def _tar_size(manual_dir: str, tar: str) -> int:
    path = os.path.join(manual_dir, tar)
    if os.path.isfile(path):
        return os.path.getsize(path)
    if not os.path.isdir(manual_dir):
        content = "no such directory"
    else:
        names = sorted(os.listdir(manual_dir))
        content = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise errors.SetupError(
        f"{path} is missing; found in {manual_dir}: {content or 'nothing'}. Both "
        f"{' and '.join(TARS.values())} are needed, unpacked no further. They come "
        "from https://image-net.org/download-images (registration, then the images of "
        "ILSVRC 2012, tasks 1 and 2). If you have the images as folders, train on "
        "those instead: --config.data.source=folder --config.data.dir=DIR."
    )


def _check_room(data_dir: str, num_bytes: int) -> None:
    """Compares the free space with what the set and its temporary files take."""
    os.makedirs(data_dir, exist_ok=True)
    needed = int(1.05 * num_bytes)
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise errors.SetupError(
            f"{data_dir} has {free / 2**30:.0f} GiB free; the set needs about "
            f"{needed / 2**30:.0f} GiB. Make room or give another --data_dir."
        )


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Replaces what the stock builder uses of TensorFlow."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    files = types.SimpleNamespace(
        GFile=open, exists=os.path.exists, remove=os.remove
    )
    local = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=files),
        errors=types.SimpleNamespace(ResourceExhaustedError=_NeverRaised),
    )
    replaced = [
        (imagenet2012_dataset_builder, "tf", local),
        (imagenet2012_dataset_builder.imagenet_common, "tf", local),
        (extractor, "tf", local),
        (shuffle, "tf", local),
        (tfds.core.utils, "jpeg_cmyk_to_rgb", _cmyk_to_rgb),
        (tfds.core.utils, "png_to_jpeg", _png_to_jpeg),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    tfds_source.allow_many_files()  # TFDS shuffles with 1000 of them
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _NeverRaised(Exception):
    """Stands for an error of TensorFlow's files that ordinary files do not raise."""


def _cmyk_to_rgb(image: bytes, quality: int = 100) -> bytes:
    """Re-encodes a CMYK JPEG as RGB with the arithmetic of tf.image.decode_jpeg."""
    picture = Image.open(io.BytesIO(image), formats=("JPEG",))
    if picture.mode != "CMYK":
        return _encode(picture.convert("RGB"), quality)
    # PIL inverts what the file holds, by Adobe's convention.
    stored = 255 - np.asarray(picture).astype(np.int32)
    colour, black = stored[..., :3], stored[..., 3:]
    if "adobe" in picture.info:
        rgb = colour * black // 255
    else:
        rgb = (255 - colour) * (255 - black) // 255
    return _encode(Image.fromarray(rgb.astype(np.uint8)), quality)


def _png_to_jpeg(image: bytes, quality: int = 100) -> bytes:
    picture = Image.open(io.BytesIO(image), formats=("PNG",))
    return _encode(picture.convert("RGB"), quality)


def _encode(picture: Image.Image, quality: int) -> bytes:
    """Encodes with the defaults of tf.image.encode_jpeg."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0", dpi=(300, 300))
    return file.getvalue()
