"""What is to be predicted, and how wrong a prediction is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from ml_collections import ConfigDict

import crossmae_jax
from crossmae_jax import convert, errors, losses, masking, targets, train
from crossmae_jax.convert import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.targets.pixels import Pixels
from crossmae_jax.tokens import Tokens, patchify
from tests import quick_digits
from tests.test_models import MAE, make_config


def _normal(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def _pixels(size, patch_size=4, channels=3, normalize=True):
    return Pixels(size, channels=channels, patch_size=patch_size, normalize=normalize)


def test_standardised_pixels_use_the_unbiased_variance():
    images = _normal(1, 4, 4, 3)
    target = _pixels((4, 4))({}, images)["pixels"]
    flat = np.asarray(images, np.float64).reshape(-1)
    expected = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(target.values[0, 0], expected, atol=1e-6)
    assert target.ids is None and target.grid == (1, 1)


@pytest.mark.parametrize("normalize", [True, False])
def test_predictions_return_to_pixels_with_the_true_statistics(normalize):
    target, images = _pixels((8, 12), normalize=normalize), _normal(2, 8, 12, 3)
    values, ids = patchify(images, patch_size=4), jnp.array([[5, 0], [2, 1]])
    perfect = Tokens(target({}, images)["pixels"].at(ids), ids, (2, 3))
    shown = target.pixels({"pixels": perfect}, images)
    assert (shown.name, shown.of_image) == ("pixels", True)
    back = shown.pictures
    rows = jnp.arange(2)[:, None]
    np.testing.assert_allclose(back.values, values[rows, ids], atol=1e-5)
    assert back.ids is ids and target.widths == {"pixels": 48}


@pytest.mark.parametrize("normalize", [True, False])
def test_pixels_of_several_scales_are_those_of_each_cell(normalize):
    target = Pixels((8, 16), 3, 4, normalize=normalize, cells=(2, 4, 8))
    images = _normal(2, 8, 16, 3)
    found = target({}, images)
    assert target.widths == {"pixels_2": 12, "pixels_4": 48, "pixels_8": 192}
    for name, side in (("pixels_2", 2), ("pixels_4", 4), ("pixels_8", 8)):
        grid = (8 // side, 16 // side)
        assert found[name].grid == target.grids[name] == grid
        for number in range(grid[0] * grid[1]):
            row, column = (side * i for i in divmod(number, grid[1]))
            cell = np.asarray(images)[1, row : row + side, column : column + side]
            expected = cell.astype(np.float64).reshape(-1)
            if normalize:
                deviation = np.sqrt(expected.var(ddof=1) + 1e-6)
                expected = (expected - expected.mean()) / deviation
            np.testing.assert_allclose(
                found[name].values[1, number], expected, atol=1e-6
            )
    # Those of the size of a patch are what without cells all are.
    alone = _pixels((8, 16), normalize=normalize)({}, images)["pixels"]
    np.testing.assert_array_equal(found["pixels_4"].values, alone.values)


@pytest.mark.parametrize("cells, name", [
    ((1, 2, 8), "pixels_2"), ((2, 8), "pixels_2"), ((8, 16), "pixels_8"),
    ((16, 4, 1), "pixels_4"),
])
def test_the_scale_nearest_to_a_patch_is_looked_at(cells, name):
    target = Pixels((16, 32), 3, 4, normalize=True, cells=cells)
    images = _normal(2, 16, 32, 3)
    shown = target.pixels(target({}, images), images)
    assert (shown.name, shown.of_image) == (name, True)
    values = patchify(images, patch_size=int(name[7:]))
    np.testing.assert_allclose(shown.pictures.values, values, atol=1e-5)
    assert f"Shown: cells of {name[7:]} pixels; not shown: cells of " in target.caption


def test_one_value_cannot_be_standardised():
    target = _pixels((2, 2), patch_size=1, channels=1)
    with pytest.raises(ValueError, match="larger patch or config.target.normalize"):
        target({}, jnp.ones((1, 2, 2, 1)))


@pytest.mark.parametrize("options, message", [
    (dict(kind="sounds"), "Unknown target.kind 'sounds'. Known: hog, pixels."),
    (dict(kind="pixels"), "target.kind='pixels' needs normalize; set config.target."),
    (dict(kind="pixels", normalize=True, bin=9),
     "Unknown option target.bin=9. Known: attention, bias, bins, blocks,"),
    (dict(kind="pixels", normalize=True, bins=18), "target.bins=18 is an option of "),
    (dict(kind="hog", cells=(3,)), "Image size 8x8 is not a multiple of patch 3"),
    (dict(kind="hog", cells=(4, 4)), r"target.cells=\(4, 4\) must be different sides"),
    (dict(kind="hog", cells=()), r"target.cells=\(\) must be different sides"),
    (dict(kind="hog", cells=(4,), bins=0), "target.bins"),
])
def test_a_target_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        data = dict(image_size=(8, 8), channels=3)
        targets.make(ConfigDict(dict(target=options, data=data)), patch_size=4)


def test_losses_have_their_closed_forms():
    pred, target = _normal(2, 3, 4), _normal(2, 3, 4, seed=1)
    difference = np.asarray(pred) - np.asarray(target)
    np.testing.assert_allclose(losses.mse(pred, target), difference**2, rtol=1e-6)
    np.testing.assert_allclose(losses.l1(pred, target), abs(difference), rtol=1e-6)
    chances = jax.nn.softmax(target)
    found = losses.cross_entropy(pred, chances)
    power = np.exp(np.asarray(pred, np.float64))
    log_chances = np.log(power / power.sum(-1, keepdims=True))
    expected = -(np.asarray(chances) * log_chances).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for measure in losses.LOSSES.values():
        halves = measure(pred.astype("bfloat16"), chances.astype("bfloat16"))
        assert halves.dtype == jnp.float32


def test_a_mean_weighs_places():
    values, weights = _normal(2, 3, 4), jnp.array([[1.0, 0.0, 0.5], [2.0, 1.0, 1.0]])
    places = np.asarray(values).mean(2)
    np.testing.assert_allclose(losses.mean(values), places.mean(1), rtol=1e-5)
    for given in (weights, weights[:1]):
        expected = (places * given).sum(1) / given.sum(1)
        np.testing.assert_allclose(losses.mean(values, given), expected, rtol=1e-5)


# ----- The loss of a prediction, whatever is predicted. -------------------------------


@dataclasses.dataclass
class Stub:
    """A target with given answers."""

    answers: dict

    def __call__(self, variables, images):
        return self.answers

    @property
    def widths(self):
        return {name: x.sequence.shape[-1] for name, x in self.answers.items()}


def _objective(**changes):
    """An objective on 4 x 6 patches, and token ids of two samples."""
    objective = Pretrain(make_config(**changes))
    batch = {"sample": jnp.arange(2, dtype=jnp.uint32)}
    return objective, objective.sample(jax.random.key(0), batch)


def _all_of(grid, *, dim=5, seed=0):
    return Tokens(_normal(2, grid[0] * grid[1], dim, seed=seed), None, grid)


@pytest.mark.parametrize("grid", [(4, 6), (8, 12), (2, 3)])
def test_cells_of_another_grid_count_by_how_much_of_them_is_masked(grid):
    objective, ids = _objective(**MAE)
    pred, target = _all_of(grid), _all_of(grid, seed=1)
    loss, aux = objective.prediction_loss({"cells": pred}, {"cells": target}, ids)
    share = masking.coverage(ids.pred, grid=(4, 6), of=grid)
    error = ((pred.values - target.values) ** 2).mean(-1)
    expected = ((error * share).sum(1) / share.sum(1)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    trivial = target.values.var(-1)
    expected = ((trivial * share).sum(1) / share.sum(1)).mean()
    np.testing.assert_allclose(aux.metrics["loss_trivial"], expected, rtol=1e-5)


def test_thrown_cells_have_their_weight_on_any_grid():
    changes = dict(masking__pred_ratio=0.75, masking__throw_ratio=0.5)
    objective, ids = _objective(
        **changes, model__aggregator__kind="conv", loss__thrown_weight=0.25
    )
    pred, target = _all_of((4, 6)), _all_of((4, 6), seed=1)
    found = objective.prediction_loss({"cells": pred}, {"cells": target}, ids)
    masked = jnp.concatenate([ids.pred, ids.thrown], axis=1)
    chosen = Tokens(pred.at(masked), masked, (4, 6))
    expected = objective.prediction_loss({"cells": chosen}, {"cells": target}, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
                 found, expected)


def test_what_is_asked_for_counts_masked_or_not():
    objective, ids = _objective(loss__kind="cross_entropy")
    places = jnp.array([[3, 1], [0, 5]])
    target = Tokens(jax.nn.softmax(_normal(2, 2, 24)), places, (4, 6))
    pred = target.with_values(_normal(2, 2, 24, seed=1))
    loss, aux = objective.prediction_loss({"rows": pred}, {"rows": target}, ids)
    expected = losses.cross_entropy(pred.values, target.values).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # The trivial predictor knows nothing: all are alike.
    np.testing.assert_allclose(aux.metrics["loss_trivial"], np.log(24), rtol=1e-5)


def test_several_targets_have_a_kind_and_a_weight_each():
    objective, ids = _objective()
    objective.config.loss = dict(
        kind=dict(near="l1", far="mse"), thrown_weight=1.0, weights=dict(far=3.0)
    )
    pred = {"near": _all_of((4, 6)), "far": _all_of((2, 3), seed=1)}
    target = {"near": _all_of((4, 6), seed=2), "far": _all_of((2, 3), seed=3)}
    loss, aux = objective.prediction_loss(pred, target, ids)
    total = aux.metrics["loss_near"] + 3 * aux.metrics["loss_far"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    error = abs(pred["near"].at(ids.pred) - target["near"].at(ids.pred)).mean()
    np.testing.assert_allclose(aux.metrics["loss_near"], error, rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(loss__kind="huber"), "Unknown loss.kind 'huber' of pixels. Known: cross_ent"),
    (dict(loss__weights=dict(hog=2.0)), "loss.weights names hog, but target.kind='pix"),
])
def test_losses_that_do_not_exist_are_refused(changes, message):
    config = make_config()
    for name, value in changes.items():
        config.loss[name.removeprefix("loss__")] = value
    with pytest.raises(ValueError, match=message):
        Pretrain(config)

@dataclasses.dataclass(frozen=True)
class Steepness:
    """How much a patch varies: a target that cannot be turned into pixels."""

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    power: float

    caption = None
    groups = starts = FrozenDict()

    @property
    def widths(self):
        return {"steepness": 1}

    @property
    def grids(self):
        grid = tuple(side // self.patch_size for side in self.image_size)
        return dict.fromkeys(self.widths, grid)

    def init(self, key):
        return {}

    def __call__(self, variables, images):
        values = patchify(images, patch_size=self.patch_size)
        grid = tuple(side // self.patch_size for side in self.image_size)
        spread = values.std(-1, keepdims=True) ** self.power
        return {"steepness": Tokens(spread, None, grid)}

    def pixels(self, predicted, images):
        raise AssertionError("without a caption nobody asks for pixels")


def test_a_new_target_needs_a_row_and_a_config_and_nothing_else(
    digits_dir, tmp_path, monkeypatch
):
    """A whole run: trained, evaluated, saved, gone on with, its page, its features."""
    monkeypatch.setitem(targets.TARGETS, "steepness", Steepness)
    config = quick_digits.get_config()
    config.target = ConfigDict(dict(kind="steepness", power=0.5))
    del config.evals["reconstruction"]
    config.update_from_flattened_dict({
        "data.data_dir": digits_dir, "epochs": 0.5, "optim.warmup_epochs": 0.1,
    })
    found = train.run(config, tmp_path / "run")
    assert found["train/loss"] < 1 and found["eval/knn/top1"] > 0.1
    assert (tmp_path / "run" / "report.html").exists()
    model = crossmae_jax.load(tmp_path / "run")
    assert model.card.target == {"kind": "steepness", "power": 0.5}
    images = np.zeros((2, 16, 16, 1), np.uint8)
    assert model(images).shape == (2, 32) and model.targets(images).shape == (2, 16, 1)
    with pytest.raises(ConversionError, match="no pictures"):
        model.reconstruct(images)
    with pytest.raises(ConversionError, match="predicts steepness, which the format"):
        convert.export_weights(tmp_path / "run", tmp_path / "out.pth", format="mae")
    config.evals = {"reconstruction": dict(every_epochs=0.0, num_images=2)}
    with pytest.raises(errors.SetupError, match="needs the output reconstruction"):
        train.run(config, tmp_path / "other")
