"""The 15 corruptions of ImageNet-C, applied while images are read.

"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(Hendrycks & Dietterich, arXiv 1903.12261) stores corrupted JPEGs of the ImageNet
validation set. Here an image of any data set is decoded, resized and cropped as
evaluation does (`transforms.eval_image`), then corrupted, and never stored. The
arithmetic is that of the package imagecorruptions-imaug (Apache-2.0), a maintained fork
of the one that Michaelis et al. (arXiv 1907.07484) made of the paper's own code.

Where the stored sets differ, so that results should not be compared across:

- They were resized bilinearly, and compressed once more as JPEGs of quality 85.
- Their motion blur, which snow uses too, is ImageMagick's. Their elastic_transform has
  other parameters and, before it, a random affine map. Their frost is cut out of five
  pictures, the package's out of six.
- Their random numbers are others.

Most sizes, of blurs and of snow flakes, are in pixels and were chosen for images of
224: severities mean more on smaller images and less on larger ones. Grey images are
corrupted as three equal channels, of which the green one is kept.
"""

import functools
import hashlib
import json
import threading
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

from crossmae_jax import errors
from crossmae_jax.data import transforms
from crossmae_jax.data.sources import Source
from crossmae_jax.data.transforms import Record

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32

_SEEDED = ("glass_blur", "impulse_noise")  # these do not draw from np.random
# The others do, and loader threads share it.
_NUMPY_RANDOM = threading.Lock()


class Corrupted:
    """The images of another source as evaluation sees them, corrupted.

    What image i becomes is a function of (seed, corruption, severity, i): the same for
    any number of workers. The images have `data.image_size`, so `pipeline.eval_batches`
    passes them on unchanged. With `data.workers=0` one image is corrupted at a time,
    because threads share NumPy's random state, which is put back after each.

    Args:
      data: image_size, channels, eval_crop_ratio and max_pixels are used.
      corruption: one of `CORRUPTIONS`.
      severity: one of `SEVERITIES`.

    Raises:
      ValueError: for an unknown corruption or severity, or images that are too small or
        neither grey nor coloured.
      MissingPackage: if the extra "robustness" is not installed.
    """

    def __init__(
        self,
        source: Source,
        data: ConfigDict,
        *,
        corruption: str,
        severity: int,
        seed: int = 0,
    ):
        check(corruption, severity)
        if seed < 0:
            raise ValueError(f"seed={seed}; expected 0 or more.")
        height, width = data.image_size
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(
                f"data.image_size={(height, width)} is too small to be corrupted; the "
                f"corruptions need {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more. "
                "Evaluate a model of larger images."
            )
        if data.channels not in (1, 3):
            raise ValueError(
                f"data.channels={data.channels} cannot be corrupted; the corruptions "
                "are for 1 channel (grey) or 3 (colour)."
            )
        _library()
        self.source = source
        self.corruption, self.severity, self.seed = corruption, severity, seed
        # What else has a place in the image would not be cropped with it.
        self.kinds = source.kinds & {"label"}
        self.classes = source.classes
        self._max_pixels = data.max_pixels  # changes no image, so no fingerprint
        self._view = {
            "image_size": (height, width),
            "channels": data.channels,
            "crop_ratio": data.eval_crop_ratio,
        }

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        clean = transforms.eval_image(
            record["image"], name=record["name"], max_pixels=self._max_pixels,
            **self._view,
        )
        kept = {kind: record[kind] for kind in self.kinds}
        return kept | {"name": record["name"], "image": self._corrupt(clean, index)}

    def name(self, index: int) -> str:
        """What the source calls the image."""
        return self.source.name(index)

    @functools.cached_property
    def fingerprint(self) -> str:
        what = [self.source.fingerprint, self.corruption, self.severity, self.seed]
        digest = hashlib.sha256(json.dumps([*what, *self._view.values()]).encode())
        return f"{len(self)}-{digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        return f"Corrupted({self.source!r}, {self.corruption} {self.severity})"

    def _corrupt(self, image: np.ndarray, index: int) -> np.ndarray:
        number = CORRUPTIONS.index(self.corruption)
        entropy = (self.seed, number, self.severity, index)
        words = np.random.SeedSequence(entropy).generate_state(4)
        options = {"seed": int(words[0])} if self.corruption in _SEEDED else {}
        with _NUMPY_RANDOM:
            before = np.random.get_state()
            np.random.seed(words)
            try:
                corrupted = _library().corrupt(
                    image, self.severity, self.corruption, **options
                )
            finally:
                np.random.set_state(before)
        return corrupted if image.shape[-1] == 3 else corrupted[..., 1:2]


def check(corruption: str, severity: int) -> None:
    """Raises ValueError unless there is such a corruption of such a severity."""
    if corruption not in CORRUPTIONS:
        known = ", ".join(CORRUPTIONS)
        raise ValueError(f"Unknown corruption {corruption!r}. Known: {known}.")
    if severity not in SEVERITIES:
        raise ValueError(
            f"severity={severity!r} of {corruption}; expected a whole number from "
            f"{SEVERITIES[0]} to {SEVERITIES[-1]}."
        )


def _library() -> ModuleType:
    try:
        import imagecorruptions
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "imagecorruptions":
            reason = "is not installed"
        else:
            reason = (
                f"does not import ({error}); its OpenCV needs libGL and GLib of the "
                "system (Debian: apt-get install libgl1 libglib2.0-0), and the older "
                "package imagecorruptions must not be installed beside it"
            )
        raise errors.MissingPackage(
            f"imagecorruptions-imaug, which corrupts images, {reason}: "
            "pip install 'crossmae-jax[robustness]'."
        ) from None
    return imagecorruptions
