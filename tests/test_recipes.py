"""The recipes of SimMIM and LocalMIM are those of their published code."""

import pytest

from crossmae_jax.objectives import OBJECTIVES
from crossmae_jax.optim import optimizers
from tests.test_configs import ROOT, load


def test_the_recipe_of_simmim_is_its_codes():
    config = load(ROOT / "configs" / "vitb_simmim.py")
    optim, encoder = config.optim, config.model.encoder
    assert (config.epochs, optim.warmup_epochs, optim.drop_epochs) == (800, 10, (700,))
    assert optimizers.peak_lr(config) == pytest.approx(4e-4)
    assert (optim.warmup_lr, optim.b1, optim.b2, optim.clip_norm) == (
        2e-6, 0.9, 0.999, 5.0
    )
    assert (encoder.size, encoder.positions, encoder.relative_bias) == (
        "B/16", "none", "shared"
    )
    assert (encoder.layer_scale, encoder.drop_path, encoder.qkv_bias) == (
        0.1, 0.1, "qv"
    )
    objective = OBJECTIVES["pretrain"](config)
    assert objective.counts == (76, 120, 0) and objective.model.encoder.final_norm
    assert (config.loss.kind, config.target.normalize) == ("l1", False)
    assert (config.data.crop_scale, config.data.interpolation) == (
        (0.67, 1.0), "bilinear"
    )
    short = load(ROOT / "configs" / "vitb_simmim_100.py")
    assert (short.epochs, short.optim.schedule, short.optim.min_lr) == (
        100, "cosine", 4e-5
    )
    assert optimizers.peak_lr(short) == pytest.approx(8e-4)
    throwing = OBJECTIVES["pretrain"](load(ROOT / "configs" / "vitb_simmim_prmim.py"))
    assert throwing.counts == (76, 22, 98) and throwing.model.aggregators
    tuned = load(ROOT / "configs" / "finetune_vitb_simmim.py")
    assert optimizers.peak_lr(tuned) == pytest.approx(5e-3)
    assert (tuned.epochs, tuned.optim.warmup_epochs, tuned.optim.layer_decay) == (
        100, 20, 0.65
    )
    assert (tuned.model.encoder.relative_bias, tuned.model.pool) == (
        "per_block", "mean"
    )


def test_the_recipe_of_simmim_with_swin_is_its_codes():
    expected = {  # epochs, peak rate, window, published size
        "swinb_simmim": (800, 4e-4, 6, "B/4"), "swinl_simmim": (800, 4e-4, 12, "L/4"),
        "swinb_simmim_100": (100, 8e-4, 6, "B/4"),
    }
    for name, (epochs, rate, window, size) in expected.items():
        config = load(ROOT / "configs" / f"{name}.py")
        optim, encoder = config.optim, config.model.encoder
        assert (config.epochs, encoder.window, encoder.size) == (epochs, window, size)
        assert optimizers.peak_lr(config) == pytest.approx(rate)
        assert (optim.warmup_epochs, optim.clip_norm, optim.b2) == (10, 5.0, 0.999)
        assert (optim.schedule, optim.drop_epochs, optim.min_lr, optim.warmup_lr) == (
            ("step", (700,), 0.0, 2e-6) if epochs == 800 else ("cosine", (), 4e-5, 4e-6)
        )
        assert (encoder.drop_path, encoder.norm_epsilon) == (0.0, 1e-5)
        objective = OBJECTIVES["pretrain"](config)
        assert objective.counts == (14, 22, 0) and objective.grid == (6, 6)
        assert objective.model.encoder.windows == (window,) * 22 + (6, 6)
    throwing = OBJECTIVES["pretrain"](load(ROOT / "configs" / "swinb_simmim_prmim.py"))
    assert throwing.counts == (14, 4, 18) and throwing.model.aggregators
    tuned = load(ROOT / "configs" / "finetune_swinb_simmim.py")
    assert optimizers.peak_lr(tuned) == pytest.approx(5e-3)
    assert (tuned.epochs, tuned.optim.warmup_epochs, tuned.optim.layer_decay) == (
        100, 20, 0.8
    )
    encoder = tuned.model.encoder
    assert (encoder.drop_path, encoder.window, encoder.mask_tokens) == (0.1, 7, False)


def test_the_recipe_of_localmim_is_its_codes():
    expected = {  # epochs, warm-up, peak rate, bins, thrown
        "vitb_local": (1600, 40, 1.6e-3, 9, 0), "vitl_local": (800, 40, 2.4e-3, 18, 0),
        "vitb_local_prmim": (100, 10, 1.6e-3, 9, 98),
    }
    for name, (epochs, warmup, rate, bins, thrown) in expected.items():
        config = load(ROOT / "configs" / f"{name}.py")
        assert (config.epochs, config.optim.warmup_epochs) == (epochs, warmup)
        assert optimizers.peak_lr(config) == pytest.approx(rate)
        assert config.optim.min_lr == 1e-6
        objective = OBJECTIVES["pretrain"](config)
        depth = objective.model.encoder.depth
        # Blocks 1, 3, depth - 3, depth - 1; position 0 is the encoder's input.
        maps = (2, 4, depth - 2, depth)
        assert objective.model.fusion.used_maps == maps
        assert objective.target.grids == {
            "hog_4": (56, 56), "hog_8": (28, 28), "hog_16": (14, 14), "hog_32": (7, 7),
        }
        assert set(objective.target.widths.values()) == {3 * bins}
        assert objective.counts.num_thrown == thrown
        assert len(objective.model.aggregators) == 4 * (thrown > 0)
    rates = {  # absolute rate at 1024, least rate, warm-up, epochs, decay, drop path
        "vitb": (2e-3, 1e-5, 20, 100, 0.65, 0.1), "vitl": (3e-3, 1e-6, 5, 50, 0.75, 0.2)
    }
    for size, recipe in rates.items():
        config = load(ROOT / "configs" / f"finetune_{size}_local.py")
        assert recipe == (
            pytest.approx(optimizers.peak_lr(config)), config.optim.min_lr,
            config.optim.warmup_epochs, config.epochs, config.optim.layer_decay,
            config.model.encoder.drop_path,
        )
