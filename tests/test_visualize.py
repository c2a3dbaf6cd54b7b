"""Pictures: what is drawn where, and that nothing of the mask is given away."""

import json
import subprocess
import sys
from typing import NamedTuple

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from crossmae_jax import visualize
from crossmae_jax.targets import pixels as targets_pixels
from crossmae_jax.visualize import canvas, panels


class Pictures(NamedTuple):
    image: np.ndarray
    prediction: np.ndarray
    pasted: np.ndarray
    mask: np.ndarray
    thrown: np.ndarray
    target: np.ndarray | None = None


def pictures(num=2, height=8, width=8, channels=1):
    """True images are 0.2, predictions 0.9; the left half is hidden, in 4x4 patches."""
    image = np.full((num, height, width, channels), 0.2, np.float32)
    prediction = np.full_like(image, 0.9)
    hidden = np.zeros((height, width), bool)
    hidden[:, : width // 2] = True
    mask = np.tile(hidden[::4, ::4].reshape(1, -1), (num, 1))
    pasted = np.where(hidden[None, :, :, None], prediction, image)
    return Pictures(image, prediction, pasted, mask, np.zeros_like(mask))


def cells(path, num, height, width):
    """Reads the four columns of the first row at the middle of either half."""
    drawn = matplotlib.image.imread(path)[..., :3]
    left = [12 + i * (200 + 12) for i in range(4)]
    row = 70 + 100
    return [(drawn[row, x + 50], drawn[row, x + 150]) for x in left]


def test_columns_are_original_masked_prediction_and_pasted(tmp_path):
    path = visualize.reconstruction_panel(
        pictures(), tmp_path / "new" / "panel.png", caption="a caption"
    )
    original, masked, prediction, pasted = cells(path, 2, 8, 8)
    grey = dict(atol=1 / 255)
    np.testing.assert_allclose(original, np.full((2, 3), 0.2), **grey)
    np.testing.assert_allclose(pasted[0], np.full(3, 0.9), **grey)
    np.testing.assert_allclose(pasted[1], np.full(3, 0.2), **grey)
    np.testing.assert_allclose(masked[1], np.full(3, 0.2), **grey)
    np.testing.assert_allclose(prediction[0], np.full(3, 0.9), **grey)
    # What is left out has a colour, which no digit has, and the same in both columns.
    np.testing.assert_array_equal(masked[0], prediction[1])
    assert np.ptp(masked[0]) > 0.2


def test_small_images_are_enlarged_with_sharp_pixels(tmp_path):
    checks = np.indices((8, 8)).sum(0)[None, :, :, None] % 2
    panel = pictures(num=1)._replace(image=checks.astype(np.float32))
    path = visualize.reconstruction_panel(panel, tmp_path / "p.png", caption="")
    drawn = matplotlib.image.imread(path)[70:270, 12:212, 0]
    expected = checks[0, :, :, 0].repeat(25, 0).repeat(25, 1)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("num, height, width, channels", [
    (1, 224, 224, 3), (2, 8, 16, 2), (1, 32, 12, 13), (1, 1024, 512, 4),
])
def test_any_size_and_number_of_channels_gives_a_readable_panel(
    tmp_path, num, height, width, channels
):
    path = visualize.reconstruction_panel(
        pictures(num, height, width, channels), tmp_path / "p.png",
        caption=targets_pixels.caption(normalize=True),
    )
    drawn = matplotlib.image.imread(path)
    assert 4 * 190 < drawn.shape[1] < 4 * 470
    assert num * 80 < drawn.shape[0] < 70 + num * 460 + 100


def test_the_third_channel_of_rgb_is_blue_and_more_channels_are_said_in_the_title():
    image = np.zeros((1, 8, 8, 3), np.float32)
    image[..., 2] = 2.0  # clipped
    np.testing.assert_array_equal(canvas.drawable(image)[0, 0, 0], [0, 0, 1])
    assert panels._shown_channels("original", 3) == "original"
    assert panels._shown_channels("original", 1) == "original"
    assert panels._shown_channels("x", 13) == "x\n(channels 1-3 of 13)"
    assert panels._shown_channels("x", 2) == "x\n(channel 1 of 2)"


def test_the_caption_says_where_colours_come_from():
    standardised, raw = (
        targets_pixels.caption(normalize=normalize) for normalize in (True, False)
    )
    assert "colours and contrast are not evidence" in standardised
    assert "colours" not in raw


def test_a_panel_needs_images_and_a_mask_that_fits(tmp_path):
    with pytest.raises(ValueError, match="0 images"):
        visualize.reconstruction_panel(
            Pictures(*(array[:0] for array in pictures()[:5])), tmp_path / "p",
            caption="",
        )
    bad = pictures()._replace(mask=np.ones((2, 7), bool))
    with pytest.raises(ValueError, match="7 patches does not tile images of 8x8"):
        visualize.reconstruction_panel(bad, tmp_path / "p", caption="")


def curve(tmp_path, lines):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(lines))
    return visualize.loss_curve(log, tmp_path / "curve.png")


def line(step, **metrics):
    metrics = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return json.dumps({"step": step, **metrics}) + "\n"


def test_the_curve_takes_the_last_word_on_a_step_and_no_unfinished_line(tmp_path):
    log = [
        line(10, train_loss=0.9, train_loss_trivial=1.0),
        line(10, **{"eval_knn/top1": 0.5}),
        line(20, train_loss=0.8, train_loss_trivial=1.0),
    ]
    plain = curve(tmp_path, log).read_bytes()
    stale = line(20, train_loss=0.1, train_loss_trivial=0.2)
    assert curve(tmp_path, [*log[:2], stale, log[2]]).read_bytes() == plain
    assert curve(tmp_path, [*log, '{"step": 30, "tra']).read_bytes() == plain
    assert curve(tmp_path, [*log, line(30, train_loss=0.7)]).read_bytes() != plain


def test_a_curve_without_a_loss_or_with_a_broken_line_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has 1 metrics but no train/loss"):
        curve(tmp_path, [line(10, **{"eval_knn/top1": 0.5})])
    with pytest.raises(ValueError, match="line 1 is not an object"):
        curve(tmp_path, ["{broken\n", line(10, train_loss=0.9)])


def test_pictures_need_neither_pyplot_nor_jax():
    code = "import sys, crossmae_jax.visualize; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "crossmae_jax.visualize" in loaded
    assert not {"matplotlib.pyplot", "jax"} & set(loaded)


def test_thrown_patches_have_a_column_of_their_own(tmp_path):
    whole = pictures(num=1)
    thrown = np.zeros_like(whole.mask)
    thrown[:, 2] = True  # lower left; the upper left one was decoded
    path = visualize.reconstruction_panel(
        whole._replace(thrown=thrown), tmp_path / "p.png", caption=""
    )
    drawn = matplotlib.image.imread(path)[..., :3]
    left = [12 + i * (200 + 12) for i in range(5)]
    assert drawn.shape[1] == left[-1] + 200 + 12
    decoded, put_together = (
        [drawn[70 + row, left[column] + 50] for row in (50, 150)] for column in (2, 3)
    )
    predicted, blank = np.full(3, 0.9), drawn[70 + 50, left[1] + 50]
    for found, expected in zip(
        (*decoded, *put_together), (predicted, blank, blank, predicted), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1 / 255)


class Ids(NamedTuple):
    keep: np.ndarray
    pred: np.ndarray
    thrown: np.ndarray


def test_the_sampling_panel_colours_every_patch_by_its_group(tmp_path):
    ids = Ids(*(np.array([[i], [3 - i]]) for i in range(3)))
    path = visualize.sampling_panel(
        {"random": ids, "furthest": ids}, tmp_path / "new" / "p.png", grid=(2, 2)
    )
    drawn = matplotlib.image.imread(path)[..., :3]
    for colour in ("#f2d16b", "#1f5fa8", "#d9d9d9"):
        target = matplotlib.colors.to_rgb(colour)
        share = (np.abs(drawn - target).max(-1) < 0.01).mean()
        assert share > 0.05, f"a patch of each group, in four grids: {colour}"
    # Patches that are in no group are white, like the paper.
    assert (drawn > 0.99).all(-1).mean() > 0.2
