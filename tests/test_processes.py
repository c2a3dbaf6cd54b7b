"""Two and four real processes against one: the same run, whoever makes it."""

import json
import signal

import numpy as np
import pytest

from crossmae_jax import train
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.commands import evaluate
from crossmae_jax.distributed.preemption import REQUEUE
from crossmae_jax.runs import confusions
from tests import processes
from tests.test_classify import make_config

STEPS = 60
HEARTBEAT = 5


def arguments(digits_dir, workdir, **changes):
    """Returns the flags of a short run; four devices, whoever has them."""
    settings = {
        "data.data_dir": digits_dir, "data.batch_size": 64, "data.workers": 0,
        "epochs": (STEPS + 0.5) * 64 / 1442, "optim.warmup_epochs": 0.2,
        "log_every_steps": 1, "checkpoint.keep": 50,
        "checkpoint.every_epochs": 10 * 64 / 1442,
    } | changes
    return [
        "crossmae_jax.main", "--config=tests/quick_digits.py", f"--workdir={workdir}",
        f"--heartbeat_seconds={HEARTBEAT}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def evaluated(workdir):
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in last.items() if name.startswith("eval/")}


@pytest.fixture(scope="module")
def alone(digits_dir, tmp_path_factory):
    """The workdir of the run of one process, which nothing interrupts."""
    base = tmp_path_factory.mktemp("alone")
    with processes.started(
        [arguments(digits_dir, base / "run")], base / "logs"
    ) as group:
        assert group.wait() == [0], group.all_said()
        first, second = group.said(0).splitlines()[:2]
        assert first == f"FRESH START in {base / 'run'} (--resume=auto)"
        assert second == "host 0/1, 4 local of 4 devices (cpu)"
        assert "goodput" in group.said(0)
    return base / "run"


def test_a_run_may_move_between_processes_and_be_killed_and_stays_the_same(
    alone, digits_dir, tmp_path
):
    """Two processes with the state cut, two of which one is killed, one."""
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    whole = arguments(digits_dir, run)

    cut = arguments(digits_dir, run, **{"mesh.fsdp": 2})
    with processes.started([cut] * 2, tmp_path / "cut") as group:
        group.wait_for(metrics, '"step": 5,')
        group.processes[1].send_signal(signal.SIGUSR1)  # one is asked, all stop
        assert group.wait() == [REQUEUE] * 2, group.all_said()
        assert "host 1/2, 2 local of 4 devices (cpu)\n" in group.said(1)
        assert "mesh: 2 data x 2 fsdp; weights and moments cut over 2" in group.said(0)
        assert group.all_said().count("FRESH START") == 1  # process 0 speaks

    # What two have written this process alone can read.
    alone_read = checkpointer.restore_variables(run / "checkpoints")["params"]
    assert alone_read["encoder"]["blocks_1"]["mlp"]["fc1"]["kernel"].shape == (32, 128)

    with processes.started([whole] * 2, tmp_path / "two") as group:
        group.wait_for(metrics, f'"step": {max(losses(run)) + 5},')
        group.processes[1].kill()
        assert group.wait(10 * HEARTBEAT)[0] != 0
        assert group.all_said().count("RESUMED at step") == 1
        # The runtime's own words, and the process's number.
        assert "unhealthy (stopped sending heartbeats):\n1\n" in group.said(0)

    with processes.started([whole], tmp_path / "again") as group:
        assert group.wait() == [0], group.all_said()
        assert "RESUMED at step" in group.said(0)
        assert "goodput" in group.said(0) and "restart" in group.said(0)

    expected, found = losses(alone), losses(run)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=2e-5
    )
    assert evaluated(run) == pytest.approx(evaluated(alone), abs=0.01)
    mine, theirs = (
        checkpointer.restore_variables(place / "checkpoints")["params"]
        for place in (run, alone)
    )
    for name in ("qkv", "proj"):
        a, b = (
            x["encoder"]["blocks_1"]["attn"][name]["kernel"] for x in (mine, theirs)
        )
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def test_several_processes_evaluate_every_image_once(alone, digits_dir, tmp_path):
    given = [
        "crossmae_jax", "evaluate", f"--checkpoint={alone}", "--suite=knn",
        f"--workdir={tmp_path / 'report'}", f"--config.data.data_dir={digits_dir}",
    ]
    with processes.started([given] * 2, tmp_path / "logs") as group:
        assert group.wait() == [0, 0], group.all_said()
        assert "355/355" in group.said(0) and "355/355" not in group.said(1)
        assert "host 1/2, 2 local of 4 devices (cpu)\n" in group.said(1)
    file = tmp_path / "report" / "evaluation.json"
    found = json.loads(file.read_text())["metrics"]
    assert found["knn/mean/k20/top1"] == pytest.approx(
        evaluated(alone)["eval/knn/mean/k20/top1"], abs=0.006  # two images
    )


def test_several_processes_count_alike_which_class_is_taken_for_which(
    digits_dir, tmp_path
):
    config = make_config(
        digits_dir, epochs=0.1, optim__warmup_epochs=0.0, checkpoint__best="", evals={},
        model__head_std=1.0, data__workers=0,
    )
    train.run(config, tmp_path / "run")
    given = [
        "crossmae_jax", "evaluate", f"--checkpoint={tmp_path / 'run'}",
        "--suite=accuracy", f"--workdir={tmp_path / 'two'}",
    ]
    with processes.started([given] * 2, tmp_path / "logs") as group:
        assert group.wait() == [0, 0], group.all_said()
        assert "most often taken for another" in group.said(0)
        assert "most often taken for another" not in group.said(1)
    assert evaluate.main([*given[2:-1], f"--workdir={tmp_path / 'one'}"]) == 0
    two, one = (
        confusions.read(tmp_path / name / "confusions.csv") for name in ("two", "one")
    )
    assert two == one and sum(pair.images for pair in one) == 355


def test_processes_with_different_settings_do_not_train(digits_dir, tmp_path):
    given = [
        arguments(digits_dir, tmp_path / "run", **{"optim.weight_decay": decay})
        for decay in (0.05, 0.06)
    ]
    with processes.started(given, tmp_path / "logs") as group:
        assert group.wait() == [1, 1]
        for i in range(2):
            assert (
                "error: The configuration of host(s) 1 is not that of host 0"
            ) in group.said(i)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [2, 4])  # of two devices each, and of one
def test_a_process_that_fails_alone_does_not_wait_for_the_others(number, tmp_path):
    given = ["tests.processes", str(HEARTBEAT)]
    with processes.started([given] * number, tmp_path / "logs") as group:
        statuses = group.wait(120)
        assert statuses[1] == 1 and statuses[0] not in (0, 1), group.all_said()
        assert "KeyError: 'only in process 1'" in group.said(1)
        assert "waiting up to" in group.said(0)
        assert "unhealthy (stopped sending heartbeats):\n1\n" in group.said(0)
