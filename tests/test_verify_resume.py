"""A run that is killed is compared with one that was not, by those who rely on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_cross
from crossmae_jax import errors, job, verify_resume
from crossmae_jax.checkpoints import checkpointer, schedule
from crossmae_jax.commands import flags
from crossmae_jax.commands import verify_resume as command
from crossmae_jax.distributed import determinism
from crossmae_jax.runs import metrics, workdir
from crossmae_jax.train_step import TrainState

ROOT = Path(__file__).parents[1]
FLAG = "--xla_gpu_deterministic_ops"


def _config(digits_dir):
    config = digits_cross.get_config()
    config.data.data_dir = digits_dir
    return config


def test_a_run_that_is_killed_on_two_devices_is_found_equal(digits_dir, tmp_path):
    flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    found = subprocess.run(
        [
            sys.executable, "-m", "crossmae_jax", "verify-resume",
            "--config=tests/quick_digits.py", f"--config.data.data_dir={digits_dir}",
            f"--workdir={tmp_path / 'v'}", "--seed=3", "--steps=40", "--deterministic",
        ],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    said = found.stdout
    assert said.startswith("verify-resume: `tests/quick_digits.py` with `data.data_")
    assert "40 steps, --seed=3" in said
    assert re.search(r"\| arrays of the last checkpoint +\| +154 \| +0 \|", said)
    values = re.search(r"\| values in metrics.jsonl +\| +(\d+) \| +0 \|", said)
    assert int(values[1]) >= 4 * 40
    assert said.rstrip().endswith("equal, bit for bit")
    killed, drawn, resumed = map(int, re.search(
        r"SIGKILL after step (\d+) \((\d+) was drawn\); went on from step (\d+)", said
    ).groups())
    assert drawn == 16 <= killed <= 40 and 8 <= resumed < 40
    log = (tmp_path / "v" / "killed.log").read_text()
    assert f"RESUMED at step {resumed} of 40" in log and "Killed" not in log
    assert log.count("deterministic: XLA_FLAGS has " + FLAG) == 2
    for name in ("undisturbed", "killed"):
        run = tmp_path / "v" / name
        ran_on = json.loads((run / "environment.json").read_text())
        assert len(ran_on["devices"]) == 2 and f"{FLAG}=true" in ran_on["xla_flags"]
        rows = metrics.rows(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 41))
        assert verify_resume.TIMES & rows[-1].keys()


@pytest.mark.parametrize("steps", [3, 20, 21, 100])
def test_a_short_form_has_so_many_steps_and_the_same_model(digits_dir, steps):
    config = _config(digits_dir)
    config.checkpoint.update(every_epochs=1.0, keep_every_epochs=2.0)
    short = verify_resume.shortened(config, steps=steps, save_every=2)
    total, steps_per_epoch = job.duration(short, 1442)
    assert total == steps
    saving = schedule.of(
        short.checkpoint, steps_per_epoch=steps_per_epoch, total=total
    )
    assert saving == (2, 0)
    for group in ("data", "loss", "masking", "model", "seed", "target"):
        assert short[group] == config[group], group
    assert 0 < short.optim.warmup_epochs < short.epochs
    assert not short.evals and config.evals, "the one given stays as it is"


def test_a_configuration_that_is_written_is_the_one_that_training_reads(tmp_path):
    config = digits_cross.get_config()
    config.seed, config.data.data_dir = 3, "a \"quoted\" 'place'"
    verify_resume.write_config(tmp_path / "x.py", config, title="Some digits.")
    read = flags.load_config(tmp_path / "x.py")
    assert read.to_dict() == config.to_dict()
    assert (tmp_path / "x.py").read_text().startswith('"""Some digits."""')
    assert sorted(x.name for x in tmp_path.glob("x.*")) == ["x.json", "x.py"]


def _run(directory, value, loss, *, dtype=np.float32):
    state = TrainState(
        jnp.asarray(2, jnp.int32), {"params": {"w": jnp.asarray(value, dtype)}},
        {"mu": jnp.asarray([1.0, 2.0])},
    )
    checkpoints = checkpointer.Checkpoints(directory / "checkpoints", keep=1)
    checkpoints.save(2, state, wait=True)
    checkpoints.close()
    line = {"step": 2, "train/loss": loss, "train/goodput": np.random.rand()}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return directory


def test_what_differs_is_named_with_how_much(tmp_path):
    one = _run(tmp_path / "one", [1.0, 2.0], 0.5)
    same = verify_resume.compare(one, _run(tmp_path / "same", [1.0, 2.0], 0.5), 2)
    assert same == ((5, 1), [], [])  # neither the step nor a time is compared
    counts, arrays, lines = verify_resume.compare(
        one, _run(tmp_path / "other", [1.0, 2.25], 0.75), 2
    )
    assert arrays == [("variables/params/w", 0.25)]
    assert lines == [("step 2, train/loss", 0.25)]
    verdict = verify_resume.Verdict(7, 8, 4, counts, arrays, lines)
    said = str(verdict)
    assert not verdict.equal and "NOT equal" in said and "--deterministic" in said
    assert "variables/params/w differs by 0.25" in said
    assert "step 2, train/loss differs by 0.25" in said
    other = _run(tmp_path / "type", [1.0, 2.0], None, dtype=np.float16)
    _, arrays, lines = verify_resume.compare(one, other, 2)
    assert arrays == [("variables/params/w", float("inf"))]
    assert lines == [("step 2, train/loss", float("inf"))]


@pytest.mark.parametrize("one, other", [
    (0.0, -0.0), (1.0, np.nextafter(1.0, 2.0)), (1, 1.0), (1.0, None),
])
def test_values_are_the_same_in_every_bit_or_differ(one, other):
    assert verify_resume.differing({"x": one}, {"x": other})
    assert not verify_resume.differing({"x": one}, {"x": one})
    assert verify_resume.differing({"x": one}, {})
    assert not verify_resume.differing({"x": float("nan")}, {"x": float("nan")})


def test_what_cannot_be_verified_is_refused_before_anything_runs(digits_dir, tmp_path):
    config = _config(digits_dir)
    alone = {"PATH": os.environ["PATH"]}
    several = alone | {
        "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    with pytest.raises(errors.SetupError, match="one of 2 processes.*Start it on one"):
        verify_resume.verify(
            config, tmp_path / "a", steps=20, seed=0, environment=several
        )
    with pytest.raises(errors.SetupError, match="steps=2"):
        verify_resume.verify(config, tmp_path / "a", steps=2, seed=0, environment=alone)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")
    with pytest.raises(errors.SetupError, match="is not empty"):
        verify_resume.verify(config, tmp_path, steps=20, seed=0, environment=alone)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--config=configs/digits_cross.py", "--workdir=gs://b/x"])
    assert stopped.value.code == 2


def test_a_run_that_fails_is_named_with_its_last_lines(digits_dir, tmp_path):
    with pytest.raises(verify_resume.Failed) as caught:
        verify_resume.verify(
            _config(digits_dir), tmp_path / "v", steps=20, seed=0,
            flags=["--no_such_flag=1"],
        )
    said = str(caught.value)
    assert "The run undisturbed ended with status 2" in said
    assert str(tmp_path / "v" / "undisturbed.log") in said
    assert "Unknown flag --no_such_flag" in said


# --deterministic.


@pytest.mark.parametrize("given, then", [
    ({}, f"{FLAG}=true"), ({"XLA_FLAGS": "--a=1  --b"}, f"--a=1 --b {FLAG}=true"),
    ({"XLA_FLAGS": f"{FLAG}=true --a=1"}, f"{FLAG}=true --a=1"),
    ({"XLA_FLAGS": FLAG}, FLAG),
])
def test_the_flag_joins_those_that_are_given(monkeypatch, given, then):
    monkeypatch.delitem(sys.modules, "jax")
    environment = dict(given)
    assert determinism.require(environment).startswith("deterministic: ")
    assert environment["XLA_FLAGS"] == then


def test_the_opposite_of_deterministic_and_a_late_one_are_refused(monkeypatch):
    environment = {"XLA_FLAGS": f"{FLAG}=false"}
    with pytest.raises(errors.SetupError, match="JAX is imported"):
        determinism.require({})
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(errors.SetupError, match=f"{FLAG}=false.*opposite"):
        determinism.require(environment)
    assert environment == {"XLA_FLAGS": f"{FLAG}=false"}


# What changes the bits of a run that goes on, and is allowed.


def test_a_change_of_the_order_of_sums_is_told(tmp_path):
    config = digits_cross.get_config()
    assert workdir.claim(tmp_path, config, resuming=False, dataset={}) == []
    assert workdir.claim(tmp_path, config, resuming=True, dataset={}) == []
    config.model.remat, config.mesh.fsdp, config.log_every_steps = "full", 2, 7
    assert workdir.claim(tmp_path, config, resuming=True, dataset={}) == [
        "mesh.fsdp: 0 -> 2", "model.remat: 'selective' -> 'full'",
    ]
    assert workdir.claim(tmp_path, config, resuming=True, dataset={}) == []
