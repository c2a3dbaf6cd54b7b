"""What lies in a directory of checkpoints is said truly, and only ours is pruned."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import digits_cross
from crossmae_jax import __main__ as front_door
from crossmae_jax import errors
from crossmae_jax.checkpoints import checkpointer, digests, space, steps
from crossmae_jax.runs import inventory, lock, workdir
from tests.states import flip, make_state, payload

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints of four steps, and a best one."""
    run = tmp_path_factory.mktemp("runs") / "one"
    config = digits_cross.get_config()
    config.checkpoint.best = "eval/knn/top1"
    dataset = {"num_images": 15 * config.data.batch_size}
    workdir.claim(run, config, dataset=dataset, resuming=False)
    checkpoints = checkpointer.Checkpoints(run / "checkpoints", keep=4)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, make_state(step // 10))
    checkpoints.close()
    best = checkpointer.Checkpoints(run / "best" / "checkpoints", keep=1)
    best.save(20, make_state(2), notes={"value": 0.5}, wait=True)
    best.close()
    workdir.claim(run / "best", config, dataset=dataset, resuming=False)
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def call(capsys):
    def call(*arguments):
        try:
            status = front_door.main(["checkpoints", *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def rows(printed):
    """Returns size and state of each step in a table."""
    lines = [line.split("|")[1:-1] for line in printed.splitlines() if line[:1] == "|"]
    return {name.strip(): (size.strip(), state.strip())
            for name, size, state in lines[2:]}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def spoil(run):
    """Adds to a run what kills and damages leave."""
    steps = run / "checkpoints"
    flip(payload(steps / "40"))
    (payload(steps / "30", "optimizer")).unlink()
    shutil.copytree(steps / "10", steps / "5.damaged")
    (steps / "50.orbax-checkpoint-tmp").mkdir()
    (steps / "notes.txt").write_text("mine")
    (steps / "my 20").mkdir()


def test_listed_is_what_is_there_of_which_model_and_how_large(run, call):
    spoil(run)
    status, out, _ = call("ls", run)
    assert status == 0
    first, second = out.splitlines()[:2]
    assert first == str(run / "checkpoints")
    assert second == "pretrain: encoder vit W64-D4-H4/2, decoder cross"
    found = rows(out)
    states = {name: state for name, (_, state) in found.items()}
    assert states.pop("30").startswith("damaged: optimizer/")  # a name, no digest
    assert states == {
        "5.damaged": "put aside as damaged", "10": "complete", "20": "complete",
        "40": "complete", "50.orbax-checkpoint-tmp": "never completed",
        "best/20": "complete",
    }
    assert found["10"][0] == space.shown(space.num_bytes(run / "checkpoints" / "10"))
    assert "GB are free on the disk" in out.splitlines()[-1]


def test_verified_is_every_byte(run, call):
    status, out, _ = call("verify", run / "checkpoints")
    assert status == 0 and out.splitlines()[-1] == "none is damaged"
    flip(payload(run / "best" / "checkpoints" / "20", "notes"))
    spoil(run)
    status, out, _ = call("verify", run)
    assert status == 1 and out.splitlines()[-1] == "3 damaged"
    found = rows(out)
    assert found["40"][1].startswith("damaged: digest mismatch in variables/")
    assert found["best/20"][1].startswith("damaged: digest mismatch in notes/")
    assert found["10"][1] == found["20"][1] == "complete"
    assert found["50.orbax-checkpoint-tmp"][1] == "never completed"


def test_inspected_are_the_tensors_and_the_settings(run, call, tmp_path):
    status, out, _ = call("inspect", run / "best")
    assert status == 0 and "step 20: " in out and 'notes: {"value": 0.5}' in out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in out.splitlines()]
    assert ["params/encoder/kernel", "8 x 4", "float32", "0.1 kB"] in cells
    assert ["params/head/kernel", "4 x 2", "bfloat16", "0.0 kB"] in cells
    assert ["step", "one", "int32", "0.0 kB"] in cells
    assert "4 tensors, 0.2 kB" in out
    file = tmp_path / "config.py"
    file.write_text(
        "from configs import digits_cross\n"
        "def get_config():\n"
        "    config = digits_cross.get_config()\n"
        "    config.optim.base_lr = 1.0\n"
        "    return config\n"
    )
    status, out, _ = call("inspect", run, "--step=10", f"--config={file}")
    assert status == 0 and "step 10: " in out
    assert f"settings, run -> {file}:" in out
    lines = out.splitlines()
    assert lines[-2:] == [
        "  checkpoint.best: 'eval/knn/top1' -> ''", "  optim.base_lr: 0.012 -> 1.0"
    ]
    status, _, err = call("inspect", run, "--step=15")
    assert status == 2 and "No complete step 15 in" in err and "[10, 20, 30, 40]" in err


def test_pruned_are_old_steps_of_ours_and_only_if_that_is_confirmed(run, call):
    spoil(run)
    before = names(run)
    best = names(run / "best")
    status, out, _ = call("prune", run, "--keep=1")
    assert status == 0 and names(run) == before
    lines = out.splitlines()[2:]
    assert lines[0] == "keep    20  newest"
    assert lines[1].startswith("keep    30  damaged: optimizer/")
    assert lines[2].startswith("keep    40  damaged: digest mismatch")
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["delete", "5.damaged"], ["delete", "10"],
        ["delete", "50.orbax-checkpoint-tmp"],
    ]
    assert lines[6].startswith("Would delete 3 of ") and "--yes does it" in lines[6]
    status, out, _ = call("prune", run, "--keep=1", "--yes")
    assert status == 0 and "Deleted 3 of " in out
    assert names(run) == ["20", "30", "40", "my 20", "notes.txt"]
    assert names(run / "best") == best and not (run / lock.FILE).exists()


@pytest.mark.parametrize("keep, flag, expected", [
    (1, [], ["40"]), (2, [], ["30", "40"]), (9, [], ["10", "20", "30", "40"]),
    (1, ["--keep_every=20"], ["20", "40"]), (1, ["--keep_every=0"], ["40"]),
])
def test_the_newest_stay_and_multiples(run, call, keep, flag, expected):
    assert call("prune", run, f"--keep={keep}", "--yes", *flag)[0] == 0
    assert names(run) == expected


def test_what_the_run_keeps_for_good_stays(run, call):
    config = json.loads((run / "config.json").read_text())
    # 15 steps an epoch: a save every 10 steps, every second one for good.
    config["checkpoint"] |= {"every_epochs": 2 / 3, "keep_every_epochs": 4 / 3}
    (run / "config.json").write_text(json.dumps(config))
    status, out, _ = call("prune", run, "--keep=1", "--yes")
    assert status == 0 and "keep    20  kept for good, a multiple of 20" in out
    assert names(run) == ["20", "40"]
    (run / "dataset.json").write_text("{}")
    status, _, err = call("prune", run, "--keep=1", "--yes")
    assert status == 2 and "has no num_images; give --keep_every=STEPS" in err
    assert names(run) == ["20", "40"]
    assert call("prune", run, "--keep=1", "--keep_every=0", "--yes")[0] == 0
    assert names(run) == ["40"]


def test_what_the_run_once_kept_for_good_stays(run, call):
    steps.mark_for_good(run / "checkpoints" / "10", 10)
    status, out, _ = call("prune", run, "--keep=1", "--yes")
    assert status == 0 and "keep    10  kept for good, as it was saved to be" in out
    assert names(run) == ["10", "40"]
    assert call("verify", run)[0] == 0
    assert call("prune", run, "--keep=1", "--keep_every=0", "--yes")[0] == 0
    assert names(run) == ["40"]


REFUSED = {
    "best": (lambda run: run / "best", "holds the best state of"),
    "the best's checkpoints": (
        lambda run: run / "best" / "checkpoints", "holds the best state of"),
    "another's": (
        lambda run: (run / "config.json").write_text("{}") and run,
        "is not the configuration of a run"),
    "nobody's": (
        lambda run: (run / "config.json").unlink() or run, "nobody can tell whose"),
    "nowhere": (lambda run: run / "none", "there is no such directory"),
    "all damaged": (
        lambda run: [(run / "checkpoints" / step / digests.LIST).unlink()
                     for step in ("10", "20", "30", "40")] and run,
        "is whole, so none is deleted: 10 damaged: SHA256SUMS is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_pruned_where_that_could_be_a_mistake(run, call, case):
    make, message = REFUSED[case]
    place = make(run)
    before = sorted(run.rglob("*"))
    status, _, err = call("prune", place, "--keep=1", "--yes")
    assert status == 2 and message in err, err
    assert sorted(run.rglob("*")) == before
    for wrong in ("--keep=0", "--keep=-1"):
        assert call("prune", run, wrong, "--yes")[0] == 2
    assert call("prune", run, "--keep=1", "--keep_every=-5", "--yes")[0] == 2
    assert sorted(run.rglob("*")) == before


def test_where_nothing_is_pruned_nothing_is_written_either(run, call):
    (run / "config.json").write_text("{}")
    (run / lock.FILE).write_text("of somebody else")
    status, _, err = call("prune", run, "--keep=1", "--yes")
    assert status == 2 and "is not the configuration of a run" in err
    assert (run / lock.FILE).read_text() == "of somebody else"


def test_a_run_that_is_training_is_not_pruned(run, call):
    with lock.held(run):
        status, _, err = call("prune", run, "--keep=1", "--yes")
    assert status == 2 and f"{run} is in use by another run" in err
    assert len(names(run)) == 4


def test_an_end_while_a_step_is_removed_leaves_no_step_that_misses_files(
    run, monkeypatch
):
    def fail(path):
        payload(path).unlink()
        raise OSError("the host died")

    monkeypatch.setattr(shutil, "rmtree", fail)
    choice = inventory.choose(inventory.find(run), keep=1)
    with pytest.raises(OSError, match="the host died"):
        inventory.remove(choice.go)
    assert names(run) == ["10.orbax-checkpoint-tmp", "20", "30", "40"]


def test_a_damaged_config_hides_no_checkpoint(run, call):
    (run / "config.json").write_text("{")
    status, out, _ = call("ls", run)
    assert status == 0 and "config.json is damaged" in out and len(rows(out)) == 5


def test_other_devices_than_those_of_the_run_are_not_needed(run):
    found = subprocess.run(
        [sys.executable, "-m", "crossmae_jax", "checkpoints", "inspect", str(run)],
        env={**os.environ, "JAX_PLATFORMS": "tpu", "XLA_FLAGS": ""}, cwd=ROOT,
        capture_output=True, text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "params/encoder/kernel" in found.stdout


def test_no_checkpoints_are_an_error_that_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(errors.SetupError, match="found notes.txt instead"):
        inventory.find(tmp_path)
