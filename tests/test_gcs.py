"""Runs, checkpoints and images in a bucket; real Orbax, TFDS and training on one."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import crossmae_jax
from crossmae_jax import (
    checkpoint,
    digests,
    metrics,
    mirror,
    parallel,
    remote,
    train,
    workdir,
)
from crossmae_jax.convert import ConversionError
from crossmae_jax.data import digits, imagenet, pipeline, sources
from tests import bucket as buckets
from tests import saved_runs, test_checkpoint, test_train
from tests.test_checkpoint import abstract, assert_same, bits, make_state

ROOT = Path(__file__).parent.parent
RUN = f"gs://{buckets.NAME}/runs/one"
STEPS = f"{RUN}/checkpoints"


@pytest.fixture(scope="module")
def served():
    """A bucket for this file: clients keep the address that they saw first."""
    with buckets.serve() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment(bucket.url).items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket(served):
    """The bucket, empty."""
    served.refused = None
    served.received.clear()
    served.written.clear()
    for name in served.names():
        served.delete(name)
    return served


@pytest.fixture
def saved(bucket):
    """Steps 10 and 20 of a run that has ended."""
    checkpoints = checkpoint.Checkpoints(STEPS, keep=2)
    for value in (1, 2):
        checkpoints.save(value * 10, make_state(value))
    checkpoints.close()
    return bucket


def reopen():
    return checkpoint.Checkpoints(STEPS, keep=2)


def object_of(bucket, step, part):
    """The largest object of an item of a step."""
    names = bucket.names(f"runs/one/checkpoints/{step}/{part}/")
    return max(names, key=lambda name: len(bucket.read(name)))


def flip(bucket, name):
    data = bytearray(bucket.read(name))
    data[len(data) // 2] ^= 1
    bucket.write(name, bytes(data))


def test_state_comes_back_bit_for_bit(saved):
    step, restored = reopen().restore_latest(abstract(make_state(2)))
    assert step == 20
    assert_same(restored, make_state(2))
    variables = checkpoint.restore_variables(STEPS, step=10)
    assert bits(variables) == bits(make_state(1).variables)
    assert any("/d/" in call for call in saved.received)  # tensorstore's


def test_nothing_saved_is_none_and_only_the_newest_are_kept(bucket):
    checkpoints = checkpoint.Checkpoints(STEPS, keep=2)
    assert checkpoints.steps() == []
    assert checkpoints.restore_latest(abstract(make_state())) is None
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]
    assert not bucket.names("runs/one/checkpoints/1/")
    with pytest.raises(ValueError, match=r"Step 3 was not saved: gs://.*\[2, 3\]"):
        reopen().save(3, make_state(3))


def test_the_digests_are_written_before_what_commits_the_step(saved):
    place = "runs/one/checkpoints/20/"
    of_step = [
        name.removeprefix(place) for name in saved.written if name.startswith(place)
    ]
    assert of_step[-1] == remote.COMMITTED
    assert of_step.index(digests.LIST) > max(
        number for number, name in enumerate(of_step)
        if name.startswith(("variables/", "optimizer/"))
    )
    listed = saved.read(f"runs/one/checkpoints/20/{digests.LIST}").decode()
    names = {line.split("  ")[1] for line in listed.splitlines()}
    assert names == {
        name.removeprefix(place) for item in ("variables", "optimizer")
        for name in saved.names(f"{place}{item}/")
    }


@pytest.mark.parametrize("harm, reason", [
    (flip, "digest mismatch in variables/"),
    (lambda bucket, name: bucket.delete(name), "missing"),
    (lambda bucket, name: bucket.write(name, b""), "digest mismatch"),
])
def test_a_damaged_step_is_named_put_aside_and_the_one_before_is_used(
    saved, capsys, harm, reason
):
    before = saved.names("runs/one/checkpoints/20/")
    name = object_of(saved, 20, "variables")
    harm(saved, name)
    checkpoints = reopen()
    step, restored = checkpoints.restore_latest(abstract(make_state(2)))
    assert step == 10
    assert_same(restored, make_state(1))
    printed = capsys.readouterr().out
    assert f"Skipping checkpoint 20 in {STEPS}: " in printed and reason in printed
    assert f"Put {STEPS}/20 aside as 20.damaged" in printed
    assert not saved.names("runs/one/checkpoints/20/")
    moved = saved.names("runs/one/checkpoints/20.damaged/")
    assert len(moved) == len(before) - (reason == "missing")
    checkpoints.save(20, make_state(3), wait=True)
    checkpoints.close()
    assert saved.names("runs/one/checkpoints/20.damaged/") == moved
    assert_same(reopen().restore_latest(abstract(make_state(3)))[1], make_state(3))


def test_if_all_are_damaged_nothing_is_started_over(saved):
    for step in (10, 20):
        flip(saved, object_of(saved, step, "optimizer"))
    there = saved.names()
    with pytest.raises(checkpoint.RestoreError, match="2 checkpoint.*none can be"):
        reopen().restore_latest(abstract(make_state(2)))
    assert saved.names() == there


def test_a_save_that_ends_before_the_commit_is_no_step(saved, capsys):
    saved.refused = f"/30/{remote.COMMITTED}"
    checkpoints = reopen()
    with pytest.raises(Exception, match="(?i)forbidden|not allowed"):
        checkpoints.save(30, make_state(3), wait=True)
    saved.refused = None
    assert saved.names("runs/one/checkpoints/30/variables/")
    assert checkpoints.steps() == [10, 20]
    assert checkpoint.newest_step(STEPS) == 20
    again = reopen()
    assert f"{STEPS}/30 was never completed" in capsys.readouterr().out
    assert again.restore_latest(abstract(make_state(2)))[0] == 20
    again.save(30, make_state(3), wait=True)
    again.close()
    assert_same(reopen().restore_latest(abstract(make_state(3)))[1], make_state(3))


def test_an_end_while_a_step_is_put_aside_loses_no_step(saved, monkeypatch):
    flip(saved, object_of(saved, 20, "variables"))
    monkeypatch.setattr(
        type(remote.system(RUN)), "rm_file", lambda *_: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        reopen().restore_latest(abstract(make_state(2)))
    monkeypatch.undo()
    assert reopen().restore_latest(abstract(make_state(2)))[0] == 10
    assert saved.names("runs/one/checkpoints/20.damaged2/")


def test_another_model_is_a_mismatch(saved):
    with pytest.raises(checkpoint.MismatchError, match="other shape"):
        reopen().restore_latest(abstract(make_state(2, width=5)))


def test_files_of_a_run_come_and_go(bucket, capsys):
    with mirror.opened(RUN) as home:
        assert home.local != home.path and not list(home.local.iterdir())
        (home.local / "panels").mkdir()
        (home.local / "panels" / "1.png").write_bytes(b"picture")
        workdir.write_whole(home.local / "config.json", "{}")
        home.push()
        calls = len(bucket.received)
        home.push()
        assert len(bucket.received) == calls  # nothing is new
        (home.local / "metrics.jsonl").write_text('{"step": 1}\n')
        local = home.local
    assert str(RUN) in capsys.readouterr().out and not local.exists()
    assert bucket.names() == [
        f"runs/one/{name}" for name in ("config.json", "metrics.jsonl", "panels/1.png")
    ]
    bucket.write("runs/one/best/best.json", b"[]")
    bucket.write("runs/one/checkpoints/1/large.json", b"")
    with pytest.raises(KeyError), mirror.opened(RUN) as home:
        found = sorted(map(home.name, remote.files(home.local)))
        assert [str(path) for path in found] == [
            f"{RUN}/{name}" for name in ("best/best.json", "config.json",
                                         "metrics.jsonl")
        ]
        (home.local / "metrics.jsonl").write_text("longer")
        raise KeyError
    assert bucket.read("runs/one/metrics.jsonl") == b"longer"
