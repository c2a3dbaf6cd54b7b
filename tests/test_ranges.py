"""Settings that no run can have are refused by name, before anything starts."""

import re

import pytest

from configs import digits_cross, finetune_digits
from crossmae_jax import evals, masking, objectives, ranges
from crossmae_jax.data import transforms
from crossmae_jax.optim import optimizers


def prepare(config):
    """Makes of a configuration what is made of it before a run draws its weights."""
    objectives.make(config)
    transforms.make(config.data)
    schedule = optimizers.make_schedule(config, steps_per_epoch=10.0)
    optimizers.make_optimizer(config, schedule)
    evals.make(config.evals.to_dict())


@pytest.mark.parametrize("name, value, allowed", [
    ("optim.base_lr", -1.0, "0 or more"),
    ("optim.min_lr", -1e-9, "0 or more"),
    ("optim.warmup_epochs", -1.0, "0 or more"),
    ("optim.weight_decay", -0.1, "0 or more"),
    ("optim.b1", 1.0, "0 or more and below 1"),
    ("optim.b2", 1.5, "0 or more and below 1"),
    ("optim.clip_norm", 0.0, "above 0"),
    ("model.decoder.depth", 0, "1 or more"),
    ("model.decoder.dim", -64, "1 or more"),
    ("model.decoder.mlp_ratio", 0.0, "above 0"),
    ("model.encoder.mlp_ratio", -4.0, "above 0"),
    ("evals.knn.temperature", 0.0, "above 0"),
    ("evals.knn.max_train_images", 0, "1 or more"),
    ("evals.reconstruction.num_images", -8, "1 or more"),
])
def test_a_setting_out_of_range_is_named_with_what_it_may_be(name, value, allowed):
    config = digits_cross.get_config()
    prepare(config)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=f"config.{name}={value} must be {allowed}"):
        prepare(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [
    "epochs", "optim.base_lr", "optim.b1", "masking.mask_ratio", "masking.pred_ratio",
    "masking.throw_ratio", "loss.thrown_weight", "data.max_bad_share",
    "checkpoint.every_epochs", "evals.knn.every_epochs", "data.crop_scale",
])
def test_a_setting_that_is_no_finite_number_is_named(name, value):
    config = digits_cross.get_config()
    given = (value, 1.0) if name == "data.crop_scale" else value
    config.update_from_flattened_dict({name: given})
    with pytest.raises(ValueError, match=f"config.{name}={value} must be a finite"):
        objectives.make(config)


@pytest.mark.parametrize("scale", [
    (-1.0, 2.0), (0.0, 1.0), (0.5, 0.2), (0.2, 1.1), (0.5,), (0.1, 0.2, 0.3),
])
def test_a_crop_is_a_share_of_the_image(scale):
    config = digits_cross.get_config()
    config.data.crop_scale = scale
    message = f"config.data.crop_scale={scale} must be two shares"
    with pytest.raises(ValueError, match=re.escape(message)):
        transforms.make(config.data)


@pytest.mark.parametrize("change", [
    dict(image_size=(0, 16)), dict(image_size=(16, -16)), dict(channels=0),
], ids=str)
def test_an_image_has_sides_and_channels(change):
    config = digits_cross.get_config()
    config.data.update(change)
    message = f"config.data.{[*change][0]}=.* must be 1 or more"
    with pytest.raises(ValueError, match=message):
        transforms.make(config.data)


def test_one_patch_cannot_be_seen_and_hidden():
    config = digits_cross.get_config()
    config.model.encoder.size = "W64-D4-H4/16"
    with pytest.raises(ValueError, match="of 1 patch .*raise config.data.image_size"):
        objectives.make(config)
    config.model.encoder.size, config.masking.unit = "W64-D4-H4/8", 2
    with pytest.raises(ValueError, match="of 1 patch .*masking.unit"):
        objectives.make(config)


@pytest.mark.parametrize("size", ["W0-D4-H4/2", "W64-D0-H4/2", "W64-D4-H0/2"])
def test_an_encoder_has_a_width_a_depth_and_heads(size):
    config = digits_cross.get_config()
    config.model.encoder.size = size
    with pytest.raises(ValueError, match=f"Model size '{size}' must have a width, a d"):
        objectives.make(config)


@pytest.mark.parametrize("ratios, message", [
    (dict(mask_ratio=float("nan")), "mask_ratio=nan must lie between 0 and 1"),
    (dict(pred_ratio=float("inf")), "pred_ratio=inf must be above 0"),
    (dict(throw_ratio=float("nan")), "throw_ratio=nan must be 0 or more"),
])
def test_ratios_are_numbers_before_patches_are_counted(ratios, message):
    given = dict(mask_ratio=0.75, pred_ratio=0.5) | ratios
    with pytest.raises(ValueError, match=message):
        masking.token_counts(64, **given)


def test_a_classifier_has_ranges_of_its_own():
    config = finetune_digits.get_config()
    config.data.num_classes = 10
    prepare(config)
    for name, value in (
        ("model.head_std", -1.0), ("optim.trust_coefficient", 0.0),
        ("augment.mixup", -0.1),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({name: value, "optim.name": "lars"})
        with pytest.raises(ValueError, match=f"{name}={value} "):
            prepare(changed)


def test_the_limits_belong_to_what_they_are():
    ranges.check("x", 0, least=0, most=1)
    ranges.check("x", 1, least=0, most=1)
    ranges.check("x", 10**400, above=0)
    for limits in (dict(above=1), dict(below=1), dict(least=2), dict(most=0)):
        with pytest.raises(ValueError, match="config.x=1 must be "):
            ranges.check("x", 1, **limits)
    with pytest.raises(ValueError, match="config.x=nan must be a finite number"):
        ranges.check("x", float("nan"))
