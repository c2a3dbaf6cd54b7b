"""Runs with a Swin: trained, evaluated, looked at, and started from."""

import json

import jax
import numpy as np
import pytest

import crossmae_jax
from configs import common
from crossmae_jax import train
from crossmae_jax.convert import starting
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.evals import of_checkpoint
from crossmae_jax.models import relative_bias
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.runs.workdir import read_config
from tests import tiny
from tests.test_classify import make_config

SIZE = "W8-D2.1-H1.2/2"


def _pretraining(digits_dir, **changes):
    """Returns 15 steps of PR-MIM on 4 x 4 units of 4 pixels."""
    config = tiny.config(
        digits_dir, dict(
            knn=common.knn(every_epochs=0.0, pools=("mean",))["knn"],
            reconstruction=dict(every_epochs=0.0, num_images=4),
        ),
        data__image_size=(24, 24),
    )
    config.model = common.simmim_swin(SIZE, window=3) | dict(dtype="float32")
    config.model.aggregator.kind = "conv"
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6, throw_ratio=0.25)
    config.target.normalize, config.loss.kind = False, "l1"
    config.optim.update(lr_scale="none", clip_norm=5.0, decay_tokens=False)
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def _tuning(digits_dir, **changes):
    config = make_config(digits_dir, **{
        "data__image_size": (24, 24), "epochs": 1.0, "data__num_classes": 10,
    })
    config.model.encoder = common.swin(SIZE, window=3)
    config.model.pool = "normed_mean"
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    """A run of pre-training."""
    directory = tmp_path_factory.mktemp("swin") / "run"
    train.run(_pretraining(digits_dir), directory)
    return directory


def test_a_run_is_evaluated_and_looked_at_like_any_other(run):
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["eval/knn/top1"] <= 1 and results["eval/reconstruction/psnr"] > 0
    assert list((run / "panels").glob("*.png"))
    model = crossmae_jax.load(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 1), np.uint8)
    assert model.encode(images).shape == (3, 16)
    assert model.tokens(images).shape == (3, 36, 16)
    pictures = model.reconstruct(images)
    assert pictures.mask.sum(1).tolist() == [22] * 3
    assert pictures.thrown.sum(1).tolist() == [9] * 3
    larger = crossmae_jax.load(run, image_size=(48, 24))
    assert larger.tokens(np.repeat(images, 2, axis=1)).shape == (3, 72, 16)


@pytest.mark.parametrize("look", [
    lambda model, images: model.attention_maps(images, part="encoder"),
    lambda model, images: model.feature_maps(images),
], ids=["maps", "features"])
def test_what_lies_on_several_grids_is_not_laid_one_on_another(run, look):
    images = np.zeros((1, 24, 24, 1), np.uint8)
    with pytest.raises(ConversionError, match="attend within windows, on several gri"):
        look(crossmae_jax.load(run), images)


def test_a_run_goes_on_with_the_settings_that_it_was_started_with(run, digits_dir):
    """What a ViT's settings were before is none of a Swin's."""
    config = _pretraining(digits_dir)
    stored = read_config(run).model.encoder
    assert stored.to_dict() == config.model.encoder.to_dict()
    before = json.loads((run / "results.json").read_text())
    train.run(config, run)  # was finished: nothing is refused, nothing changes
    after = json.loads((run / "results.json").read_text())
    assert after["train/loss"] == before["train/loss"]


def test_a_checkpoint_is_compared_by_the_mean_of_units_alone(run, tmp_path):
    made = of_checkpoint.open_checkpoint(run, read_config(run))
    metrics = of_checkpoint.run(made, ["knn", "linear"], tmp_path / "report").metrics
    assert {"knn/top1", "knn/mean/k20/top1", "linear/top1"} <= metrics.keys()
    assert not [name for name in metrics if "cls" in name]


def test_a_classifier_is_tuned_from_it_on_larger_windows(run, digits_dir, tmp_path):
    config = _tuning(
        digits_dir, model__encoder__window=6, init_from=str(run), tune_blocks=2.0
    )
    like = jax.eval_shape(Classify(config).init, jax.random.key(0))
    plan = starting.plan(str(run), like, config)
    weights = Pretrain(_pretraining(digits_dir)).init(jax.random.key(0))["params"]
    old = weights["encoder"]["blocks_2"]["attn"]["relative_position_bias_table"]
    name = "encoder/blocks_2/attn/relative_position_bias_table"
    assert old.shape == (25, 2) and plan.tensors[name].shape == (121, 2)
    table = np.asarray(
        crossmae_jax.load(run).variables["params"]["encoder"]["blocks_2"]["attn"][
            "relative_position_bias_table"
        ]
    )
    np.testing.assert_array_equal(plan.tensors[name].read(), relative_bias.resize(
        table, grid=(3, 3), new_grid=(6, 6), of_class_token=0
    ))
    report = "\n".join(plan.report)
    assert "adapted  relative position biases of 3 blocks, windows 3 -> 6" in report
    assert plan.new == {"head"} and "encoder/mask_token" not in plan.tensors
    train.run(config, tmp_path / "tuned")
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert 0 <= results["eval/accuracy/top1"] <= 1
    tuned = crossmae_jax.load(tmp_path / "tuned")
    images = np.zeros((2, 24, 24, 1), np.uint8)
    assert tuned.logits(images).shape == (2, 10)
    before = crossmae_jax.load(run).variables["params"]["encoder"]
    after = tuned.variables["params"]["encoder"]
    kept, moved = (
        np.array_equal(*(
            side[block]["mlp"]["fc1"]["kernel"] for side in (before, after)
        )) for block in ("blocks_0", "blocks_1")
    )
    assert kept and not moved


def test_amt_needs_a_class_token(digits_dir, tmp_path):
    config = _pretraining(
        digits_dir, attention_maps__every_epochs=0.5, masking__noise="weighted",
        data__transform="weighted", model__aggregator__kind="none",
        masking__throw_ratio=0.0,
    )
    config.data.weights_grid = (6, 6)
    with pytest.raises(ValueError, match="needs a class token"):
        train.run(config, tmp_path / "amt")
