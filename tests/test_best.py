"""The best state of a run: what is kept was measured, and survives every stop."""

import json
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import train
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.data import pipeline
from crossmae_jax.distributed import preemption
from crossmae_jax.runs import best, mirror
from tests.test_classify import make_config

METRIC = "eval/accuracy/top1"


def opened(directory, *, metric=METRIC):
    knn = dict(every_epochs=1.0, k=5, temperature=0.07)
    config = make_config(
        checkpoint__best=metric, evals=dict(accuracy=dict(every_epochs=1.0), knn=knn)
    )
    return best.Best(mirror.Home(directory, directory), config, dataset={})


def state_of(number):
    return {"variables": {"w": jnp.full(3, number, jnp.float32)}, "step": jnp.array(0)}


def kept_weights(directory):
    variables = checkpointer.restore_variables(directory / "best" / "checkpoints")
    return np.asarray(variables["w"]).tolist()


def test_the_largest_value_is_kept_with_its_state(tmp_path):
    kept = opened(tmp_path)
    for step, value in ((1, 0.2), (2, 0.5), (3, 0.5), (4, float("nan")), (5, 0.1)):
        kept.offer(step, {METRIC: value}, state_of(step))
    kept.offer(6, {"eval/knn/top1": 0.9}, state_of(6))
    assert kept.metrics() == {f"best/{METRIC}": 0.5, "best/step": 2.0}
    kept.close()
    assert kept_weights(tmp_path) == [2, 2, 2]


@pytest.mark.parametrize("left", [None, {"step": 1, "metric": METRIC, "value": 0.9}])
def test_a_kill_before_the_copy_was_written_costs_nothing(tmp_path, left):
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.4}, state_of(7))
    kept.close()
    copy = tmp_path / "best" / "best.json"
    expected = copy.read_text()
    copy.unlink() if left is None else copy.write_text(json.dumps(left))
    again = opened(tmp_path)
    assert again.metrics() == {f"best/{METRIC}": 0.4, "best/step": 7.0}
    assert copy.read_text() == expected
    again.offer(8, {METRIC: 0.3}, state_of(8))
    again.close()
    assert kept_weights(tmp_path) == [7, 7, 7]


def test_the_best_of_a_run_from_before_the_notes_is_taken_up(tmp_path, capsys):
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.4}, state_of(7))
    kept.close()
    shutil.rmtree(tmp_path / "best" / "checkpoints" / "7" / "notes")
    again = opened(tmp_path)
    assert again.metrics()["best/step"] == 7
    again.close()
    # A copy that was cut tells as little as one of another state.
    copy = tmp_path / "best" / "best.json"
    for damage in ('{"step": 7, "met', "{}", '{"step": 7, "metric": 1, "value": 2}'):
        copy.write_text(damage)
        opened(tmp_path).close()
        said = capsys.readouterr().out
        assert f"{copy} is damaged (" in said and "nothing says what" in said
    # Killed between the two writes, as such runs could be: the value is not known.
    copy.write_text(json.dumps({"step": 6, "metric": METRIC, "value": 0.9}))
    again = opened(tmp_path)
    assert "step 7, and nothing says what eval/accuracy/top1" in capsys.readouterr().out
    again.offer(8, {METRIC: 0.1}, state_of(8))
    again.close()
    assert kept_weights(tmp_path) == [8, 8, 8]


def test_the_value_of_another_metric_is_not_taken_for_this_one(tmp_path, capsys):
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.9}, state_of(7))
    kept.close()
    again = opened(tmp_path, metric="eval/knn/top1")
    assert "what eval/knn/top1 it reached" in capsys.readouterr().out
    again.offer(9, {"eval/knn/top1": 0.2}, state_of(9))
    assert again.metrics() == {"best/eval/knn/top1": 0.2, "best/step": 9.0}
    again.close()


def test_a_better_state_of_an_earlier_step_takes_the_place(tmp_path):
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.4}, state_of(7))
    kept.offer(5, {METRIC: 0.6}, state_of(5))
    assert kept.metrics()["best/step"] == 5
    kept.close()
    assert kept_weights(tmp_path) == [5, 5, 5]


def test_a_step_that_is_made_again_is_kept_with_what_was_measured_of_it(tmp_path):
    """As on other devices: another state, another value, the same step."""
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.4}, state_of(7))
    kept.close()
    again = opened(tmp_path)
    again.offer(7, {METRIC: 0.6}, state_of(77))
    again.close()
    assert opened(tmp_path).metrics() == {f"best/{METRIC}": 0.6, "best/step": 7.0}
    assert kept_weights(tmp_path) == [77, 77, 77]


@pytest.mark.parametrize("step", [5, 7])
def test_a_kill_while_the_best_is_replaced_leaves_the_one_before(
    tmp_path, monkeypatch, step
):
    kept = opened(tmp_path)
    kept.offer(7, {METRIC: 0.4}, state_of(7))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpointer.Checkpoints, "save", killed)
        kept.offer(step, {METRIC: 0.6}, state_of(8))
    kept.close()
    again = opened(tmp_path)
    assert again.metrics() == {f"best/{METRIC}": 0.4, "best/step": 7.0}
    again.close()
    assert kept_weights(tmp_path) == [7, 7, 7]
    left = {path.name for path in (tmp_path / "best" / "checkpoints").iterdir()}
    assert left == {"7"}


def stop_in_evaluation(monkeypatch, number):
    """Sends SIGTERM to this process in its evaluation of that number, from 1 on."""
    evaluations = []
    original = pipeline.eval_batches

    def interrupting(*args, **kwargs):
        evaluations.append(None)
        if len(evaluations) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline, "eval_batches", interrupting)


def test_an_evaluation_that_a_stop_cut_short_counts_after_the_restart(
    digits_dir, tmp_path, monkeypatch
):
    def config():
        # The accuracy falls after the first evaluation: the rate is far too high.
        return make_config(
            digits_dir, epochs=1.0, optim__base_lr=3.0, optim__warmup_epochs=0.0,
            evals=dict(accuracy=dict(every_epochs=0.2)),
        )

    undisturbed = train.run(config(), tmp_path / "whole")
    evaluated = [
        json.loads(line) for line in
        (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line["step"] for line in evaluated if METRIC in line]
    number = 1 + steps.index(undisturbed["best/step"])
    assert number < len(steps), "the best one must not be the last"

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_in_evaluation(patch, number)
        train.run(config(), tmp_path / "stopped")
    assert stopped.value.code == preemption.REQUEUE
    again = train.run(config(), tmp_path / "stopped")
    for name in (f"best/{METRIC}", "best/step", METRIC):
        assert again[name] == undisturbed[name], name
    whole, stopped = (
        checkpointer.restore_variables(tmp_path / name / "best" / "checkpoints")
        for name in ("whole", "stopped")
    )
    np.testing.assert_array_equal(
        whole["params"]["head"]["kernel"], stopped["params"]["head"]["kernel"]
    )
