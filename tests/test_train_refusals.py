"""What stops a run before its first step, and is not blamed on the settings."""

import pytest

from crossmae_jax import errors, train
from crossmae_jax.objectives.pretrain import Pretrain
from tests import tiny


@pytest.mark.parametrize("changes, message", [
    (dict(objective="pretran"), "Unknown objective 'pretran'. Known: classify, pret"),
    (dict(data__source="folders"), "Unknown data.source 'folders'"),
    (dict(epochs=0.01), "do not fill one batch of 96"),
    (dict(data__batch_size=100), "batch_size=100 does not divide over 8 devices"),
    (dict(optim__accum_steps=5), "does not divide over 8 devices x 5 micro-batches"),
    (dict(data__channels=3), "config.data.mean has 1 values"),
    (dict(data__mean=(77.775,)), r"divided by 255: give mean=\(0.305,\)"),
    (dict(data__std=(0.0,)), "expected values above 0 in std"),
    (dict(log_every_steps=0), "log_every_steps=0 must be 1 or more"),
    (dict(optim__max_skipped_in_a_row=0), "max_skipped_in_a_row=0 must be 1 or more"),
    (dict(epochs=-1.0), "config.epochs=-1.0 must be above 0"),
    (dict(epochs=float("nan")), "config.epochs=nan must be a finite number"),
    (dict(epochs=1e9), "are 15020833333 steps, and at most 2147483647 are counted"),
    (dict(checkpoint__every_epochs=-1.0), "every_epochs=-1.0 must be 0 or more"),
    (dict(optim__base_lr=-1.0), "config.optim.base_lr=-1.0 must be 0 or more"),
    (dict(data__crop_scale=(-1.0, 2.0)), "crop_scale=.* must be two shares of an"),
    (dict(data__max_bad_share=1.5), "max_bad_share=1.5 must be 0 or more and at most"),
    (dict(data__workers=-2), "config.data.workers=-2 must be -1 or more"),
    (dict(evals=dict(rank=dict(every_epochs=-1.0))), "every_epochs=-1.0 must be 0 or"),
    (dict(evals=dict(knn=dict(k=5))), "config.evals.knn lacks every_epochs"),
    (dict(evals=dict(knn5=dict(every_epochs=0.0))), "Unknown evaluator 'knn5'"),
    (dict(evals=dict(linear=dict(every_epochs=0.0, l2=0.1))), "Unknown option 'l2'"),
    (dict(evals=dict(knn=dict(every_epochs=0.0, k=2000, temperature=0.07))),
     "k=2000 neighbours of 1442 training images"),
    (dict(seed=-1), "config.seed=-1 must be 0 or more and below 9223372036854775808"),
    (dict(seed=2**64), "config.seed=18446744073709551616 must be 0 or more and below"),
    (dict(checkpoint__keep=0), "keep=0 checkpoints"),
    (dict(checkpoint__keep_every_epochs=0.6), "=0.6 must be a multiple of checkpoint."),
    (dict(checkpoint__keep_every_epochs=0.2), "=0.2 must be a multiple of checkpoint."),
    (dict(checkpoint__keep_every_epochs=0.4, checkpoint__every_epochs=0.0),
     "must be a multiple of checkpoint.every_epochs=0.0, of whose saves"),
    (dict(checkpoint__keep_every_epochs=-1.0), "keep_every_epochs=-1.0 must be 0 or m"),
])
def test_bad_settings_stop_the_run_before_it_trains(
    digits_dir, tmp_path, changes, message
):
    with pytest.raises(errors.SetupError, match=message):
        train.run(tiny.config(digits_dir, **changes), tmp_path)
    assert tiny.text(tmp_path / "metrics.jsonl") == ""


def test_an_error_inside_the_step_is_not_blamed_on_the_settings(
    digits_dir, tmp_path, monkeypatch
):
    def broken(*_):
        raise ValueError("einsum: the subscripts do not fit")

    monkeypatch.setattr(Pretrain, "loss", broken)
    with pytest.raises(ValueError, match="subscripts") as caught:
        train.run(tiny.config(digits_dir), tmp_path)
    assert caught.type is ValueError
