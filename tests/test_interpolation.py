"""Random crops are resized as `data.interpolation` says, evaluation bicubically."""

import numpy as np
import pytest
from PIL import Image

from tests.test_transforms import _eval as evaluate
from tests.test_transforms import _Stream
from tests.test_transforms import _train as train


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_random_crops_are_resized_as_asked(name):
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    whole = _Stream(0.0, 0.5, 0.0, 0.0, 0.9)  # area, ratio, place, no flip
    found = train(image, whole, interpolation=name, crop_scale=(1.0, 1.0))
    kind = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[name]
    expected = np.asarray(Image.fromarray(image).resize((16, 16), kind))
    np.testing.assert_array_equal(found, expected)
    # Evaluation does not follow.
    np.testing.assert_array_equal(evaluate(image, interpolation=name), evaluate(image))
    with pytest.raises(ValueError, match="Unknown data.interpolation 'area'. Known"):
        train(image, interpolation="area")
