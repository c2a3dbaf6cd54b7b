"""The train loop on real digits: resuming, devices, accumulation, stopping."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits_cross
from crossmae_jax import errors, train, train_step
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.commands import train as command
from crossmae_jax.data import pipeline, sources
from crossmae_jax.distributed import parallel, preemption
from crossmae_jax.objectives.objective import Aux
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers
from crossmae_jax.runs import journal
from crossmae_jax.runs.workdir import read_config

ROOT = Path(__file__).parent.parent
# 96 images a step and 1442 in all: 15.02 steps an epoch.
TINY = {
    "epochs": 1.0, "log_every_steps": 4, "baselines": False,
    "model.encoder.size": "W16-D2-H2/4", "model.decoder.dim": 16,
    "model.decoder.depth": 1, "model.decoder.num_heads": 2,
    "optim.warmup_epochs": 0.2, "data.batch_size": 96,
    "data.image_size": (16, 16), "checkpoint.every_epochs": 0.4,
}


def _config(digits_dir, evals=None, **changes):
    config = digits_cross.get_config()
    config.update_from_flattened_dict(TINY | {"data.data_dir": digits_dir})
    config.evals = evals or {}
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def _final_state(config, workdir, steps):
    objective = Pretrain(config)
    schedule = optimizers.make_schedule(config, steps_per_epoch=1442 / 96)
    tx = optimizers.make_optimizer(config, schedule)
    abstract = jax.eval_shape(
        lambda key: train_step.init_state(objective, tx, key), jax.random.key(0)
    )
    checkpoints = checkpointer.Checkpoints(workdir / "checkpoints", keep=2)
    everywhere = parallel.replicated(parallel.make_mesh())
    abstract = parallel.with_sharding(abstract, everywhere)
    step, state = checkpoints.restore_latest(abstract)
    checkpoints.close()
    assert step == steps == state.step
    return state


def _lines(workdir):
    return list(map(json.loads, _read(workdir / "metrics.jsonl").splitlines()))


def _assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="session")
def finished(digits_dir, tmp_path_factory):
    """An uninterrupted run of 15 steps on eight devices, with every evaluator."""
    workdir = tmp_path_factory.mktemp("finished")
    config = _config(
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
    lines = _lines(workdir)
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
    for line in _lines(workdir):
        if "train/lr" in line:  # of the update that led to this step
            expected = float(schedule(line["step"] - 1))
            np.testing.assert_allclose(line["train/lr"], expected, rtol=1e-5)


def test_a_finished_run_started_again_trains_no_further(finished, capsys):
    workdir, config, found = finished
    before = _final_state(config, workdir, 15)
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
    _assert_same_bits(before, _final_state(config, workdir, 15))


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
    config = _config(digits_dir, epochs=0.2, optim__warmup_epochs=0.1)
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


def _start(digits_dir, workdir, devices=8, hold="", **changes):
    """Starts a run in a process of its own, with so many devices; see `holding`."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1", XLA_FLAGS=flags,
        JAX_DEFAULT_MATMUL_PRECISION="highest",
    )
    return subprocess.Popen(
        [
            sys.executable, "-m", "tests.holding", digits_dir, str(workdir),
            repr(changes), hold,
        ],
        cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("number, hold", [(signal.SIGTERM, "3"), (signal.SIGINT, "")])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    finished, digits_dir, tmp_path, number, hold
):
    reference, config, _ = finished
    process = _start(digits_dir, tmp_path, hold=hold, log_every_steps=1)
    while '"step": 2,' not in _read(tmp_path / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == preemption.REQUEUE, output
    assert "FRESH START" in output and "run the same command again" in output
    assert ("No batch for" in output) == bool(hold)  # that came, when it was asked
    steps = checkpointer.Checkpoints(tmp_path / "checkpoints", keep=2).steps()
    assert 2 <= steps[-1] < 15, "it was stopped on the way"

    process = _start(digits_dir, tmp_path, log_every_steps=1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"RESUMED at step {steps[-1]} of 15" in output
    assert " s to read what is compiled from " in output  # of the run before
    assert "compiled again" not in output
    _assert_same_bits(
        _final_state(config, tmp_path, 15), _final_state(config, reference, 15)
    )
    # Each step stands in the metrics once, whatever was written before the stop.
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 16))


def _read(path):
    return path.read_text() if path.exists() else ""


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, digits_dir, tmp_path):
    reference, config, _ = finished
    process = _start(digits_dir, tmp_path, log_every_steps=1)
    while '"step": 8,' not in _read(tmp_path / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    train.run(_config(digits_dir, log_every_steps=1), tmp_path)
    _assert_same_bits(
        _final_state(config, tmp_path, 15), _final_state(config, reference, 15)
    )
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 16))


def test_one_device_gives_the_numbers_of_eight(finished, digits_dir, tmp_path):
    reference, _, _ = finished
    process = _start(digits_dir, tmp_path, devices=1)
    output = process.communicate()[0]
    assert process.returncode == 0 and "1 local of 1 devices" in output, output
    ours = {line["step"]: line for line in _lines(tmp_path)}
    for line in _lines(reference):
        if "train/loss" in line:
            # Sums over the batch are taken in another order; Adam magnifies that.
            np.testing.assert_allclose(
                line["train/loss"], ours[line["step"]]["train/loss"], rtol=1e-4
            )


def _step(config, accum_steps):
    objective = Pretrain(config)
    tx = optax.sgd(1.0)
    key = jax.random.key(0, impl="threefry2x32")
    state = train_step.init_state(objective, tx, key)
    step = train_step.make_train_step(
        objective, tx, schedule=lambda step: 1.0, key=key, accum_steps=accum_steps
    )
    source = sources.make_source(config.data, "train")
    with pipeline.train_batches(
        source, config.data, seed=0, start_step=0, num_steps=1
    ) as batches:
        batch = parallel.place_batch(parallel.make_mesh(), next(batches))
    return jax.jit(step)(state, batch)


def test_compiled_steps_hold_the_state_whole_everywhere_and_reuse_its_memory():
    class Square:
        def init(self, key):
            return {"params": {"w": jax.random.normal(key, (8,))}}

        def loss(self, variables, batch, key):
            return jnp.mean((variables["params"]["w"] - batch["x"]) ** 2), Aux({})

    mesh, key = parallel.make_mesh(), jax.random.key(0)
    init, step = train_step.compile_steps(
        Square(), optax.sgd(1.0), mesh, schedule=lambda step: 1.0, key=key
    )
    state = init(key)
    before = np.asarray(state.variables["params"]["w"]).copy()
    new, _ = step(state, parallel.place_batch(mesh, {"x": np.zeros(8)}))
    # The gradient of the mean of w^2 over 8 entries is w / 4.
    np.testing.assert_allclose(new.variables["params"]["w"], 0.75 * before, rtol=1e-6)
    for leaf in jax.tree.leaves(new):
        assert leaf.sharding.is_equivalent_to(parallel.replicated(mesh), leaf.ndim)
    assert state.variables["params"]["w"].is_deleted()


def test_accumulated_micro_batches_give_the_update_of_the_whole_batch(digits_dir):
    config = _config(digits_dir)
    whole, logged = _step(config, 1)
    parts, logged_parts = _step(config, 4)
    assert parts.step == whole.step == 1
    for name in ("loss", "loss_trivial", "grad_norm"):
        np.testing.assert_allclose(logged[name], logged_parts[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        whole.variables, parts.variables,
    )


def test_a_batch_in_parts_trains_through_the_loop(digits_dir, tmp_path):
    changes = dict(epochs=0.2, optim__warmup_epochs=0.1, log_every_steps=1)
    train.run(_config(digits_dir, **changes), tmp_path / "whole")
    train.run(
        _config(digits_dir, optim__accum_steps=3, **changes), tmp_path / "parts"
    )
    for whole, parts in zip(
        _lines(tmp_path / "whole"), _lines(tmp_path / "parts"), strict=True
    ):
        np.testing.assert_allclose(
            whole["train/loss"], parts["train/loss"], rtol=1e-4
        )


def test_a_run_keeps_some_of_its_checkpoints_for_good(digits_dir, tmp_path):
    train.run(
        _config(
            digits_dir, checkpoint__every_epochs=0.2, checkpoint__keep=1,
            checkpoint__keep_every_epochs=0.4,
        ), tmp_path,
    )
    kept = checkpointer.Checkpoints(tmp_path / "checkpoints", keep=9).steps()
    assert kept == [6, 12, 15]


def test_a_loss_that_stays_not_finite_stops_the_run_unsaved(digits_dir, tmp_path):
    config = _config(digits_dir, optim__base_lr=1e30, optim__warmup_epochs=0.0)
    with pytest.raises(journal.NotFinite, match="These are steps 2 to 6; they have"):
        train.run(config, tmp_path)
    assert checkpointer.Checkpoints(tmp_path / "checkpoints", keep=2).steps() == []
    assert (tmp_path / "nan_step_2.npz").is_file()


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
        train.run(_config(digits_dir, **changes), tmp_path)
    assert _read(tmp_path / "metrics.jsonl") == ""


def test_an_error_inside_the_step_is_not_blamed_on_the_settings(
    digits_dir, tmp_path, monkeypatch
):
    def broken(*_):
        raise ValueError("einsum: the subscripts do not fit")

    monkeypatch.setattr(Pretrain, "loss", broken)
    with pytest.raises(ValueError, match="subscripts") as caught:
        train.run(_config(digits_dir), tmp_path)
    assert caught.type is ValueError


def test_micro_batches_are_spread_over_all_devices():
    batch = {"x": jnp.arange(16)}
    parts = train_step._split(batch, 2)["x"]
    np.testing.assert_array_equal(parts, [list(range(0, 16, 2)), list(range(1, 16, 2))])
