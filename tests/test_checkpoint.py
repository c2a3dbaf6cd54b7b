"""Checkpoints come back bit for bit, or not at all, from real Orbax directories."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from crossmae_jax import errors
from crossmae_jax.checkpoints import checkpointer, digests, schedule, steps
from crossmae_jax.distributed import parallel
from tests.states import (
    State,
    abstract,
    assert_same,
    flip,
    make_state,
    payload,
    reopen,
    saved,
)

__all__ = ["saved"]  # a fixture


def test_state_comes_back_bit_for_bit_with_its_structure(saved):
    state = make_state(2)
    step, restored = reopen(saved).restore_latest(abstract(state))
    assert step == 20
    assert isinstance(restored, State)
    assert_same(restored, state)


def test_nothing_saved_is_none(tmp_path):
    checkpoints = reopen(tmp_path / "new")
    assert checkpoints.restore_latest(abstract(make_state())) is None
    assert checkpoints.steps() == []


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = checkpointer.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]
    with pytest.raises(ValueError, match="keep=0"):
        checkpointer.Checkpoints(tmp_path, keep=0)


def test_some_stay_for_good_beside_the_newest(tmp_path):
    for first, last in ((1, 4), (5, 9)):  # two launches
        checkpoints = checkpointer.Checkpoints(tmp_path, keep=2, keep_every=3)
        for step in range(first, last + 1):
            checkpoints.save(step, make_state(step))
        checkpoints.close()
    assert checkpoints.steps() == [3, 6, 8, 9]


@pytest.mark.parametrize("later", [0, 5])
def test_what_stays_for_good_does_so_whatever_the_settings_become(tmp_path, later):
    for last, keep_every in ((7, 3), (10, later), (13, 0)):  # three launches
        checkpoints = checkpointer.Checkpoints(tmp_path, keep=2, keep_every=keep_every)
        for step in range(max(checkpoints.steps(), default=0) + 1, last + 1):
            checkpoints.save(step, make_state(step))
        checkpoints.close()
    for_good = [3, 6, 10] if later else [3, 6]
    assert steps.for_good(tmp_path) == for_good
    assert checkpoints.steps() == [*for_good, 12, 13]


@pytest.mark.parametrize("every, kept, steps_per_epoch, expected", [
    (1.0, 0.0, 15.02, (15, 0)), (1.0, 50.0, 15.02, (15, 750)), (0.0, 0.0, 9.0, (90, 0)),
    (0.1, 0.3, 15.02, (2, 6)), (0.01, 0.02, 15.02, (1, 2)),
])
def test_what_stays_is_one_of_every_so_many_saves(
    every, kept, steps_per_epoch, expected
):
    settings = ConfigDict(dict(every_epochs=every, keep_every_epochs=kept))
    found = schedule.of(settings, steps_per_epoch=steps_per_epoch, total=90)
    assert found == expected
    assert found.saves(expected[0]) and not found.saves(2 * expected[0] + 1) or (
        expected[0] == 1
    )


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    everywhere = parallel.replicated(parallel.make_mesh())
    checkpoints = checkpointer.Checkpoints(tmp_path, keep=1)
    advance = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
    )
    # A large one is cut for the devices to write, which copies it; a small one is not.
    weights = {"w": jnp.zeros((4000, 1000)), "b": jnp.zeros(1000)}
    state = {"variables": weights, "step": jnp.int32(0)}
    state = advance(jax.device_put(state, everywhere))
    checkpoints.save(1, state)
    later = state
    for _ in range(10):
        later = advance(later)
    jax.block_until_ready(later)
    assert state["variables"]["w"].is_deleted()  # else this test proves nothing
    _, restored = checkpoints.restore_latest(abstract(later))
    for name in weights:
        assert (np.array(restored["variables"][name]) == 1).all()


def test_digests_agree_with_sha256sum(saved):
    if shutil.which("sha256sum") is None:
        pytest.fail("coreutils' sha256sum is needed to check the format")
    for step in ("10", "20"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", digests.LIST],
            cwd=saved / step, check=True,
        )


def test_step_is_never_visible_without_its_digests(tmp_path, monkeypatch):
    names = []
    write = digests.write

    def spy(path):
        names.append(path.name)
        assert not (tmp_path / "7").exists()
        write(path)

    monkeypatch.setattr(digests, "write", spy)
    checkpoints = checkpointer.Checkpoints(tmp_path, keep=1)
    checkpoints.save(7, make_state(), wait=True)
    assert names == ["7.orbax-checkpoint-tmp"]
    assert (tmp_path / "7" / digests.LIST).exists()


DAMAGES = {
    "flipped byte in weights": (
        lambda d: flip(payload(d)), "digest mismatch in variables/"),
    "flipped byte in moments": (
        lambda d: flip(payload(d, "optimizer")), "digest mismatch in optimizer/"),
    "truncated file": (
        lambda d: os.truncate(payload(d), 10), "digest mismatch in variables/"),
    "empty file": (
        lambda d: os.truncate(payload(d), 0), "digest mismatch in variables/"),
    "deleted file": (
        lambda d: payload(d).unlink(), "missing"),
    "deleted item": (
        lambda d: shutil.rmtree(d / "optimizer"), "missing"),
    "digests deleted": (
        lambda d: (d / digests.LIST).unlink(), "SHA256SUMS is missing"),
    "digests emptied": (
        lambda d: (d / digests.LIST).write_text(""), "lists no file of"),
    "digests overwritten": (
        lambda d: (d / digests.LIST).write_bytes(b"\xff\0"), "is damaged"),
    "emptied directory": (
        lambda d: (shutil.rmtree(d), d.mkdir()), "SHA256SUMS is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_step_is_named_and_the_one_before_is_used(saved, capsys, damage):
    harm, reason = DAMAGES[damage]
    harm(saved / "20")
    checkpoints = reopen(saved)
    step, restored = checkpoints.restore_latest(abstract(make_state()))
    assert step == 10
    assert_same(restored, make_state(1))
    printed = capsys.readouterr().out
    assert "Skipping checkpoint 20" in printed and reason in printed
    # The run goes on, and writes step 20 again; the damaged one is still there.
    checkpoints.save(20, make_state(2), wait=True)
    assert (saved / "20.damaged").is_dir()
    step, restored = checkpoints.restore_latest(abstract(make_state()))
    assert step == 20
    assert_same(restored, make_state(2))


def test_no_single_flipped_byte_anywhere_gives_other_values(saved, tmp_path):
    files = [p.relative_to(saved) for p in (saved / "20").rglob("*") if p.is_file()]
    assert len(files) > 10
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        flip(copy / file)
        step, restored = reopen(copy).restore_latest(abstract(make_state()))
        assert_same(restored, make_state(step // 10))
        shutil.rmtree(copy)


def test_all_damaged_is_an_error_that_lists_each_and_touches_nothing(saved):
    flip(payload(saved / "10"))
    shutil.rmtree(saved / "20" / "variables")
    with pytest.raises(checkpointer.RestoreError) as caught:
        reopen(saved).restore_latest(abstract(make_state()))
    message = str(caught.value)
    assert "2 checkpoint(s), and none can be restored" in message
    assert "step 10: digest mismatch in variables/" in message
    assert "step 20: variables/" in message and "missing" in message
    assert "Refusing to start over" in message and "--workdir" in message
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20"]


def test_lost_digests_can_be_written_again_on_purpose(saved):
    for step in ("10", "20"):
        (saved / step / digests.LIST).unlink()
    with pytest.raises(checkpointer.RestoreError, match="digests.write"):
        reopen(saved).restore_latest(abstract(make_state()))
    digests.write(saved / "20")
    step, _ = reopen(saved).restore_latest(abstract(make_state()))
    assert step == 20


def test_refused_save_is_an_error(saved):
    checkpoints = reopen(saved)
    for step in (10, 20):
        with pytest.raises(ValueError, match=rf"Step {step} was not saved.*\[10, 20\]"):
            checkpoints.save(step, make_state())


def test_a_place_that_cannot_be_written_is_an_error_at_once(saved):
    checkpoints, aside = reopen(saved), saved.with_name("aside")
    saved.rename(aside)
    for spoil in (saved.touch, saved.unlink):  # a file; nothing
        spoil()
        begun = time.monotonic()
        with pytest.raises(errors.FileError, match="checkpoints.*Nothing was saved"):
            checkpoints.save(30, make_state(30))
        assert time.monotonic() - begun < 10  # Orbax waits for minutes
    aside.rename(saved)
    checkpoints.save(30, make_state(30))
    checkpoints.close()
    assert checkpoints.steps() == [20, 30] and not (saved / ".probe").exists()


def test_failed_background_save_is_raised_and_can_be_repeated(saved, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    checkpoints = reopen(saved)
    with monkeypatch.context() as patched:
        patched.setattr(digests, "write", full)
        checkpoints.save(30, make_state(3))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert checkpoints.steps() == [10, 20]
    checkpoints.save(30, make_state(3), wait=True)
    step, restored = checkpoints.restore_latest(abstract(make_state()))
    assert step == 30
    assert_same(restored, make_state(3))


def test_state_without_variables_or_with_other_leaves_is_refused(tmp_path):
    checkpoints = checkpointer.Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="needs a field `variables`"):
        checkpoints.save(1, {"params": jnp.ones(2)})
    with pytest.raises(ValueError, match="optimizer: step is of type int"):
        checkpoints.save(1, {"step": 1, "variables": {"w": jnp.ones(2)}})
    unplaced = {"variables": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    checkpoints.save(1, {"variables": {"w": jnp.ones(2)}}, wait=True)
    with pytest.raises(ValueError, match="w has no sharding"):
        checkpoints.restore_latest(unplaced)


ONE_DEVICE = """
    import json, os, sys, jax, jax.numpy as jnp, numpy as np
    from crossmae_jax.checkpoints import checkpointer, digests, schedule
    from crossmae_jax.distributed import parallel
    source, target = sys.argv[1:]
    assert jax.device_count() == 1
    def place(shape):
        sharding = parallel.replicated(parallel.make_mesh())
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    step, state = checkpointer.Checkpoints(source, keep=2).restore_latest(
        {"variables": {"rows": place((16, 3)), "all": place((5,))}}
    )
    print(json.dumps([step, jax.tree.map(lambda x: x.tolist(), state)]), flush=True)
    checkpoints = checkpointer.Checkpoints(target, keep=2)
    checkpoints.save(step, state, wait=True)
    # Killed while the next one is being written, right before it is committed.
    digests.write = lambda path: os.kill(os.getpid(), 9)
    checkpoints.save(step + 1, state, wait=True)
"""


def test_devices_may_change_and_a_kill_while_saving_costs_one_step(tmp_path, capsys):
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec(parallel.DATA_AXIS))
    state = {"variables": {
        "rows": jax.device_put(np.arange(48.0, dtype=np.float32).reshape(16, 3), rows),
        "all": jax.device_put(np.arange(5.0, dtype=np.float32) / 3,
                              parallel.replicated(mesh)),
    }}
    source, target = tmp_path / "eight", tmp_path / "one"
    checkpointer.Checkpoints(source, keep=2).save(4, state, wait=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ONE_DEVICE), source, target],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == -9, done.stderr
    assert json.loads(done.stdout) == [4, jax.tree.map(lambda x: x.tolist(), state)]
    assert (target / "5.orbax-checkpoint-tmp").exists()

    checkpoints = checkpointer.Checkpoints(target, keep=2)
    assert "5.orbax-checkpoint-tmp was never completed" in capsys.readouterr().out
    step, restored = checkpoints.restore_latest(abstract(state))
    assert step == 4
    assert_same(restored, state)
    assert restored["variables"]["rows"].sharding == rows
    assert len(restored["variables"]["rows"].addressable_shards) == 8
    checkpoints.save(5, restored, wait=True)
    assert checkpoints.steps() == [4, 5]
