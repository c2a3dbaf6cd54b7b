"""The train loop on real digits: resuming, devices, accumulation, stopping."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from configs import digits_cross
from crossmae_jax import errors, train
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.commands import train as command
from crossmae_jax.distributed import preemption
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import journal
from crossmae_jax.runs.workdir import read_config
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def finished(digits_dir, tmp_path_factory):
    """An uninterrupted run of 15 steps on eight devices, with every evaluator."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny.config(
        digits_dir, baselines=True,
        evals=dict(
            knn=dict(
                every_epochs=0.5, k=(5, 3), pools=("mean", "cls"), temperature=0.07,
                max_train_images=200,
            ),
            linear=dict(every_epochs=0.0, max_train_images=200),
            rank=dict(every_epochs=0.5, max_images=30),
            reconstruction=dict(every_epochs=0.0, num_images=3),
        ),
    )
    return workdir, config, train.run(config, workdir)


def test_a_run_leaves_what_the_readme_promises(finished):
    workdir, config, found = finished
    lines = tiny.lines(workdir)
    logged = [line for line in lines if "train/loss" in line]
    # Every 4 steps, at every checkpoint (6 steps), and at the end.
    assert [line["step"] for line in logged] == [4, 6, 8, 12, 15]
    for name in ("loss", "loss_trivial", "lr", "grad_norm", "epoch", "bad_images"):
        assert all(np.isfinite(line[f"train/{name}"]) for line in logged), name
    assert logged[-1]["train/images_per_second"] > 0
    assert 0 <= logged[-1]["train/data_wait"] <= 1
    evaluated = [line["step"] for line in lines if "eval/knn/top1" in line]
    assert evaluated == [8, 15]
    assert [line["step"] for line in lines if "eval/linear/top1" in line] == [15]
    ranks = {
        line["step"]: line["eval/rank/effective"] for line in lines
        if "eval/rank/effective" in line
    }
    assert list(ranks) == [8, 15] and all(1 < rank < 16 for rank in ranks.values())
    for source in ("eval", "random_init", "pixels"):
        top1 = found[f"{source}/knn/top1"]
        assert 0 < top1 <= 1 and top1 == found[f"{source}/knn/mean/k5/top1"]
        assert 0 < found[f"{source}/knn/mean/k3/top1"] <= 1
        # Raw pixels have no class token.
        assert (f"{source}/knn/cls/k3/top1" in found) == (source != "pixels")
    assert (workdir / "panels" / "step_00000015.png").stat().st_size > 1000
    assert (workdir / "curve.png").stat().st_size > 1000
    assert "Finished: step 15 of 15" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "results.json").read_text()) == found
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["seed"] == config.seed
    assert json.loads((workdir / "environment.json").read_text())["versions"]["jax"]
    assert json.loads((workdir / "dataset.json").read_text())["num_images"] == 1442


def test_the_rate_logged_is_the_rate_of_the_schedule(finished):
    workdir, config, _ = finished
    schedule = optimizers.make_schedule(config, steps_per_epoch=1442 / 96)
    for line in tiny.lines(workdir):
        if "train/lr" in line:  # of the update that led to this step
            expected = float(schedule(line["step"] - 1))
            np.testing.assert_allclose(line["train/lr"], expected, rtol=1e-5)


def test_a_finished_run_started_again_trains_no_further(finished, capsys):
    workdir, config, found = finished
    before = tiny.final_state(config, workdir, 15)
    (workdir / "time.json").write_text("{}")  # no such file may stop a run
    again = train.run(config, workdir, resume="must")
    said = capsys.readouterr().out
    assert said.startswith(f"RESUMED at step 15 of 15 from {workdir}\nhost 0/1, 8 ")
    assert f"{workdir / 'time.json'} is damaged (" in said
    assert again["eval/linear/top1"] == found["eval/linear/top1"]
    # What was found of the training is not lost.
    assert again.keys() == found.keys()
    assert {name: found[name] for name in found if name.startswith("train/")}.items() \
        <= json.loads((workdir / "results.json").read_text()).items()
    tiny.assert_same_bits(before, tiny.final_state(config, workdir, 15))


def test_another_configuration_or_data_set_cannot_go_on_in_a_runs_directory(finished):
    workdir, config, _ = finished
    changed = config.copy_and_resolve_references()
    changed.optim.base_lr, changed.log_every_steps = 1e-6, 7
    with pytest.raises(errors.SetupError, match="another run; config.json di") as error:
        train.run(changed, workdir)
    assert "optim.base_lr: 0.012 -> 1e-06" in str(error.value)
    assert "log_every_steps" not in str(error.value)
    changed = config.copy_and_resolve_references()
    changed.data.split = "train[:90%]"
    with pytest.raises(ValueError, match="another run"):
        train.run(changed, workdir)


def test_a_run_from_before_a_setting_existed_can_be_read_and_goes_on(
    finished, tmp_path, capsys
):
    directory, config, _ = finished
    shutil.copytree(directory, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    stored = json.loads(path.read_text())
    del stored["loss"], stored["model"]["aggregator"]
    del stored["masking"]["throw_ratio"], stored["masking"]["retain"]
    for name in (
        "transform", "crop", "eval_crop_ratio", "randaug_ops", "randaug_magnitude"
    ):
        del stored["data"][name]
    for name in ("name", "decay_tokens", "layer_decay"):
        del stored["optim"][name]
    del stored["model"]["remat"], stored["checkpoint"]["best"]
    del stored["checkpoint"]["keep_every_epochs"]
    path.write_text(json.dumps(stored))
    read = read_config(tmp_path / "old")
    assert Pretrain(read).counts == Pretrain(config).counts
    (tmp_path / "old" / "metrics.jsonl").unlink()
    train.run(config, tmp_path / "old")
    said = capsys.readouterr().out
    assert said.startswith("RESUMED at step 15 of 15")
    assert "metrics.jsonl is gone, th" in said
    # What an aggregator would find at visible places depends on the decoder.
    stored["model"]["decoder"]["kind"] = "mae"
    path.write_text(json.dumps(stored))
    assert read_config(tmp_path / "old").model.aggregator.visible == "decoder"


def test_reading_the_configuration_of_no_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="that a run was started with"):
        read_config(tmp_path)


def test_checkpoints_that_cannot_be_restored_stop_the_run(
    digits_dir, tmp_path, capsys
):
    config = tiny.config(digits_dir, epochs=0.2, optim__warmup_epochs=0.1)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    train.run(config, tmp_path, resume="never")  # what was never saved is none
    out = capsys.readouterr().out
    assert f"\nFRESH START in {tmp_path} (--resume=never)\nhost 0/1, 8 local" in out
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:-7])
    for resume in ("auto", "must"):
        with pytest.raises(checkpointer.RestoreError, match="checkpoints"):
            train.run(config, tmp_path, resume=resume)


def _files(directory):
    return {
        path.relative_to(directory): path.stat().st_mtime_ns
        for path in directory.rglob("*")
    }


def test_a_run_that_must_not_go_on_is_refused_and_nothing_is_changed(
    finished, tmp_path
):
    workdir, config, _ = finished
    before = _files(workdir)
    with pytest.raises(errors.SetupError) as refused:
        train.run(config, workdir, resume="never")
    assert f"{workdir} holds checkpoints of a run (12, 15)" in str(refused.value)
    assert "new --workdir, or go on with --resume=auto" in str(refused.value)
    assert _files(workdir) == before
    (tmp_path / "checkpoints" / "12.damaged").mkdir(parents=True)
    with pytest.raises(errors.SetupError, match=r"of a run \(12.damaged\)"):
        train.run(config, tmp_path, resume="never")


@pytest.mark.parametrize("there", [
    [], ["a"], ["a/checkpoints/3.orbax-checkpoint-tmp"], ["a/checkpoints/3.damaged"],
    ["a/checkpoints/notes"], ["a/checkpoints/03"],
])
def test_a_run_that_must_go_on_begins_nothing(tmp_path, there):
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    before = _files(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/a has no checkpoint to"):
        command.main([
            f"--config={ROOT}/configs/digits_cross.py", f"--workdir={tmp_path}/a",
            "--resume=must",
        ])
    assert _files(tmp_path) == before


def test_a_way_to_resume_that_there_is_not_is_named(tmp_path, capsys):
    with pytest.raises(errors.SetupError, match="resume='always'. Known: auto, must"):
        train.run(digits_cross.get_config(), tmp_path, resume="always")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--resume=ever"])
    assert stopped.value.code == 2
    assert "there is no 'ever'. Did you mean never?" in capsys.readouterr().err


@pytest.mark.parametrize("number, hold", [(signal.SIGTERM, "3"), (signal.SIGINT, "")])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    finished, digits_dir, tmp_path, number, hold
):
    reference, config, _ = finished
    process = tiny.start(digits_dir, tmp_path, hold=hold, log_every_steps=1)
    while '"step": 2,' not in tiny.text(tmp_path / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == preemption.REQUEUE, output
    assert "FRESH START" in output and "run the same command again" in output
    assert ("No batch for" in output) == bool(hold)  # that came, when it was asked
    steps = checkpointer.Checkpoints(tmp_path / "checkpoints", keep=2).steps()
    assert 2 <= steps[-1] < 15, "it was stopped on the way"

    process = tiny.start(digits_dir, tmp_path, log_every_steps=1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"RESUMED at step {steps[-1]} of 15" in output
    assert " s to read what is compiled from " in output  # of the run before
    assert "compiled again" not in output
    tiny.assert_same_bits(
        tiny.final_state(config, tmp_path, 15), tiny.final_state(config, reference, 15)
    )
    # Each step stands in the metrics once, whatever was written before the stop.
    assert [line["step"] for line in tiny.lines(tmp_path)] == list(range(1, 16))


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, digits_dir, tmp_path):
    reference, config, _ = finished
    process = tiny.start(digits_dir, tmp_path, log_every_steps=1)
    while '"step": 8,' not in tiny.text(tmp_path / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    train.run(tiny.config(digits_dir, log_every_steps=1), tmp_path)
    tiny.assert_same_bits(
        tiny.final_state(config, tmp_path, 15), tiny.final_state(config, reference, 15)
    )
    assert [line["step"] for line in tiny.lines(tmp_path)] == list(range(1, 16))


def test_one_device_gives_the_numbers_of_eight(finished, digits_dir, tmp_path):
    reference, _, _ = finished
    process = tiny.start(digits_dir, tmp_path, devices=1)
    output = process.communicate()[0]
    assert process.returncode == 0 and "1 local of 1 devices" in output, output
    ours = {line["step"]: line for line in tiny.lines(tmp_path)}
    for line in tiny.lines(reference):
        if "train/loss" in line:
            # Sums over the batch are taken in another order; Adam magnifies that.
            np.testing.assert_allclose(
                line["train/loss"], ours[line["step"]]["train/loss"], rtol=1e-4
            )


def test_a_batch_in_parts_trains_through_the_loop(digits_dir, tmp_path):
    changes = dict(epochs=0.2, optim__warmup_epochs=0.1, log_every_steps=1)
    train.run(tiny.config(digits_dir, **changes), tmp_path / "whole")
    train.run(
        tiny.config(digits_dir, optim__accum_steps=3, **changes), tmp_path / "parts"
    )
    for whole, parts in zip(
        tiny.lines(tmp_path / "whole"), tiny.lines(tmp_path / "parts"), strict=True
    ):
        np.testing.assert_allclose(
            whole["train/loss"], parts["train/loss"], rtol=1e-4
        )


def test_a_run_keeps_some_of_its_checkpoints_for_good(digits_dir, tmp_path):
    train.run(
        tiny.config(
            digits_dir, checkpoint__every_epochs=0.2, checkpoint__keep=1,
            checkpoint__keep_every_epochs=0.4,
        ), tmp_path,
    )
    kept = checkpointer.Checkpoints(tmp_path / "checkpoints", keep=9).steps()
    assert kept == [6, 12, 15]


def test_a_loss_that_stays_not_finite_stops_the_run_unsaved(digits_dir, tmp_path):
    config = tiny.config(digits_dir, optim__base_lr=1e30, optim__warmup_epochs=0.0)
    with pytest.raises(journal.NotFinite, match="These are steps 2 to 6; they have"):
        train.run(config, tmp_path)
    assert checkpointer.Checkpoints(tmp_path / "checkpoints", keep=2).steps() == []
    assert (tmp_path / "nan_step_2.npz").is_file()
