"""Oriented gradients to look at: lines along edges, in files, panels, loaded runs."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from PIL import Image

import crossmae_jax
from configs import common
from crossmae_jax import __main__ as front_door
from crossmae_jax import glyphs, train, visualize
from crossmae_jax.data import sources
from crossmae_jax.evals import reconstruction
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.probing import decoder_analysis
from crossmae_jax.targets.hog import HOG
from tests import drawn, tiny
from tests.saved_runs import save_run
from tests.test_local import PRMIM, local


def stripes(angle, *, size=64, length=16):
    """An image that varies in this direction, in degrees from the right to the top."""
    y, x = np.indices((size, size))
    radians = np.deg2rad(angle)
    return np.sin(2 * np.pi * (x * np.cos(radians) - y * np.sin(radians)) / length)


def direction(picture):
    """The angle in degrees along which the bright dots of a picture lie."""
    y, x = np.indices(picture.shape) - (picture.shape[0] - 1) / 2
    along = np.sum(picture * (x * x - y * y)), np.sum(picture * -2 * x * y)
    return np.rad2deg(np.arctan2(along[1], along[0])) / 2


def described(path):
    with Image.open(path) as picture:
        return picture.info["Description"]


@pytest.mark.parametrize("bins", [9, 18])
@pytest.mark.parametrize("angle", [0, 35, 90, 120, 165])
def test_lines_run_along_the_stripes(tmp_path, angle, bins):
    """Perpendicular to the gradient, but for half a bin."""
    image = stripes(angle).astype(np.float32)[None, :, :, None]
    target = HOG((64, 64), 1, 16, bins=bins, cells=(16,))({}, jnp.asarray(image))
    cells = np.asarray(target["hog_16"].laid_out())
    path = visualize.oriented_gradients(
        {"cells": cells}, tmp_path / "new" / "lines.png", bins=bins,
        images=(image + 1) / 2, caption="said below",
    )
    drawn_lines = matplotlib.image.imread(path)[..., 0]
    left, side = 12 + 448 + 12, 112  # behind the image; 4 x 4 cells in 448 dots
    cell = drawn_lines[70 + side : 70 + 2 * side, left + side : left + 2 * side]
    turned = (direction(cell) - (angle + 90) + 90) % 180 - 90
    assert abs(turned) < 90 / bins + 2 and cell.max() > 0.9
    assert described(path) == "said below"


def test_vertical_stripes_are_vertical_lines():
    image = jnp.asarray(stripes(0), jnp.float32)[None, :, :, None]
    cells = HOG((64, 64), 1, 16, cells=(16,))({}, image)["hog_16"].values
    line = np.asarray(glyphs.drawn(cells, bins=9, side=25))[0, 5].reshape(25, 25)
    assert line[1, 12] > 0.9 and line[23, 12] > 0.9
    assert line[12, 1] < 0.1 and line[12, 23] < 0.1


def test_a_line_is_as_bright_as_the_mean_of_its_channels():
    values = np.zeros((1, 2 * 9), np.float32)
    values[0, 4], values[0, 9 + 4] = 0.8, 0.2  # the bin of vertical lines
    values[0, 0] = values[0, 9] = -1  # predictions may be below 0
    (picture,) = glyphs.drawn(values, bins=9, side=25).reshape(1, 25, 25)
    assert picture.max() == pytest.approx(0.5) and picture[:, 12].min() > 0.2
    assert picture[:, :10].max() == 0
    crossed = glyphs.drawn(np.full((1, 9), 0.3, np.float32), bins=9, side=25)
    assert crossed.max() == pytest.approx(0.3)


def test_values_that_are_no_bins_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scale has 27 values in a cell, which are no"):
        visualize.oriented_gradients(
            {"scale": np.zeros((1, 2, 2, 27))}, tmp_path / "p.png", bins=18
        )


def _batch():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    numbers = jnp.arange(3, dtype=jnp.uint32)
    valid = jnp.array([True, True, False])
    return dict(image=jnp.asarray(pixels), sample=numbers, valid=valid)


def _error(objective, variables, batch, key, name, side):
    """The squared error of each cell, and which share of it was masked and thrown."""
    ids = objective.masked_ids(key, batch)
    images = objective.normalize(batch)
    predicted = objective.model.apply(variables, images, ids)[name]
    target = objective.target(variables, images)[name]
    error = (np.asarray(predicted.values) - np.asarray(target.values)) ** 2
    shares = []
    for part in (ids.pred, ids.thrown):
        dots = np.zeros((3, 16, 24))
        for sample, numbers in enumerate(np.asarray(part)):
            for number in numbers:
                row, column = (4 * i for i in divmod(int(number), 6))
                dots[sample, row : row + 4, column : column + 4] = 1
        cells = dots.reshape(3, 16 // side, side, 24 // side, side).mean((2, 4))
        shares.append(cells.reshape(3, -1))
    return error.mean(-1, dtype=np.float64), *shares


@pytest.mark.parametrize("kind", ["hog", "pixels"])
@pytest.mark.parametrize("cells, side, changes", [
    ((1, 4, 8), 4, {}), ((1, 4, 8), 4, PRMIM), ((2, 8), 2, {}), ((8,), 8, PRMIM),
], ids=["patches", "thrown", "finer", "coarser"])
def test_the_error_is_that_of_masked_cells(tmp_path, kind, cells, side, changes):
    maps = tuple(range(len(cells)))
    objective = Pretrain(local(
        target__kind=kind, target__cells=cells, model__fusion__maps=maps, **changes
    ))
    variables, key = drawn.variables(objective.init), jax.random.key(3)
    output, batch = objective.outputs["reconstruction"], _batch()
    found = reconstruction.evaluate(
        lambda batch: jax.jit(output.function)(variables, batch, key), [batch],
        lambda batch: batch, tmp_path / "panel.png", caption=output.caption,
    )
    name = f"{kind}_{side}"
    error, decoded, thrown = (
        x[batch["valid"]] for x in _error(objective, variables, batch, key, name, side)
    )
    shares = {"mse": decoded + thrown}
    if changes:
        shares |= {"mse_retained": decoded, "mse_thrown": thrown}
    expected = {
        name: (error * share).sum() / share.sum() for name, share in shares.items()
    }
    of_images = {name: found.pop(name) for name in list(found) if "psnr" in name}
    assert found == pytest.approx(expected, rel=1e-4)
    assert bool(of_images) == (kind == "pixels")
    assert (tmp_path / "panel.png").exists()
    assert f"Shown: cells of {side} pixels" in output.caption


def test_predictions_are_drawn_where_patches_were_masked():
    objective = Pretrain(local(target__cells=(2, 8), model__fusion__maps=(0, 1)))
    variables, key, batch = drawn.variables(objective.init), jax.random.key(3), _batch()
    output = objective.outputs["reconstruction"].function
    found = jax.jit(output)(variables, batch, key)
    np.testing.assert_allclose(found.image, batch["image"] / 255, atol=1e-6)
    assert found.target.shape == (3, 8 * 24, 12 * 24, 1)
    hidden = np.asarray(found.mask).reshape(3, 4, 6).repeat(48, 1).repeat(48, 2)
    shown, target, pasted = (
        np.asarray(x)[..., 0] for x in (found.prediction, found.target, found.pasted)
    )
    assert (shown[~hidden] == 0).all() and shown[hidden].any()
    np.testing.assert_array_equal(pasted, np.where(hidden, shown, target))


def small(digits_dir, evals):
    """Settings of a LocalMIM of two scales, of 15 steps."""
    config = tiny.config(digits_dir, evals)
    model = common.local("W16-D2-H2/4")
    model["fusion"]["maps"] = (0, 1)
    model["decoder"].update(dim=16, num_heads=2)
    config.model = model | dict(dtype="float32")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.target.cells = (4, 8)
    return config


@pytest.fixture(scope="module")
def runs(digits_dir, tmp_path_factory):
    """Runs of oriented gradients and of pixels, with a panel each."""
    directory, evals = tmp_path_factory.mktemp("runs"), common.panels(every_epochs=0.0)
    for kind in ("hog", "pixels"):
        config = small(digits_dir, evals)
        config.target.kind = kind
        train.run(config, directory / kind)
    return directory


@pytest.mark.parametrize("kind, columns", [("hog", 5), ("pixels", 4)])
def test_a_run_draws_a_panel_and_knows_no_ratio_of_gradients(runs, kind, columns):
    results = json.loads((runs / kind / "results.json").read_text())
    assert results["eval/reconstruction/mse"] > 0
    assert ("eval/reconstruction/psnr" in results) == (kind == "pixels")
    (panel,) = (runs / kind / "panels").iterdir()
    # Images of 16 dots are drawn in 12 x 16, oriented gradients in 4 cells of 24.
    width = matplotlib.image.imread(panel).shape[1]
    assert width == 12 + columns * (192 + 12)
    assert described(panel).endswith("Shown: cells of 4 pixels; not shown: cells of 8.")
    rows = map(json.loads, (runs / kind / "metrics.jsonl").read_text().splitlines())
    names = {f"train/loss_{kind}_4", f"train/loss_{kind}_8"}
    assert names <= set().union(*rows)


@pytest.mark.parametrize("kind, said", [("hog", "mean squared"), ("pixels", "PSNR ")])
def test_a_loaded_run_is_looked_at(runs, tmp_path, capsys, kind, said):
    model = crossmae_jax.load(runs / kind)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    found = model.reconstruct(images)
    assert (found.target is None) == (kind == "pixels")
    assert "Shown: cells of 4 pixels" in model.caption
    (line,) = (line for line in model.card.lines() if line.startswith("target"))
    assert f"kind {kind}" in line and "cells" in line
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "one.png")
    panel = tmp_path / "panel.png"
    assert not front_door.main([
        "reconstruct", f"--checkpoint={runs / kind}", str(tmp_path / "one.png"),
        f"--to={panel}",
    ])
    assert panel.exists() and f"seed 0: {said}" in capsys.readouterr().out


def test_gradients_of_patches_are_analysed_without_a_ratio(tmp_path):
    """MAE's decoder predicts them as well, one scale of cells as large as patches."""
    run = save_run(
        tmp_path / "run", "digits_local", "model.dtype=float32", "target.cells=(4,)",
        "model.encoder.size=W16-D1-H2/4", "model.fusion.maps=(0,)",
        "model.decoder.kind=mae",
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "one.png")
    model = crossmae_jax.load(run)
    source = sources.FolderSource(str(tmp_path / "images"))
    scores = decoder_analysis.ablations(model, source, progress=False)
    assert scores["full"].mse > 0 and scores["full"].psnr is None
    assert "PSNR" not in decoder_analysis.table(scores)
    image = model.prepare([pixels[:, :, None]])
    *_, last = model.after_each_block(image)
    np.testing.assert_allclose(
        last.prediction, model.reconstruct(image).prediction, atol=1e-4
    )
