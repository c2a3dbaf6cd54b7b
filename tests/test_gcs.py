"""Runs, checkpoints and images in a bucket; real Orbax, TFDS and training on one."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import crossmae_jax
from crossmae_jax import errors, objectives, paths, train
from crossmae_jax.checkpoints import checkpointer, digests, space
from crossmae_jax.commands import checkpoints as command
from crossmae_jax.convert import ConversionError, starting
from crossmae_jax.data import pipeline, sources
from crossmae_jax.data.sets import digits
from crossmae_jax.report import run_page
from crossmae_jax.runs import journal, mirror, replay, workdir
from tests import bucket as buckets
from tests import states, tiny
from tests.image_files import config as settings
from tests.image_files import write_folder
from tests.states import abstract, assert_same, bits, make_state

ROOT = Path(__file__).parent.parent
RUN = f"gs://{buckets.NAME}/runs/one"
FOLDER = "runs/one/checkpoints"
STEPS = f"gs://{buckets.NAME}/{FOLDER}"


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
    """The bucket with two steps of a run."""
    states.save_two(STEPS)
    return bucket


def reopen():
    return states.reopen(STEPS)


def test_state_comes_back_bit_for_bit(saved):
    step, restored = reopen().restore_latest(abstract(make_state(2)))
    assert step == 20
    assert_same(restored, make_state(2))
    variables = checkpointer.restore_variables(STEPS, step=10)
    assert bits(variables) == bits(make_state(1).variables)
    assert any("/d/" in call for call in saved.received)  # tensorstore's


def test_nothing_saved_is_none_and_only_the_newest_are_kept(bucket):
    checkpoints = checkpointer.Checkpoints(STEPS, keep=2)
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
    assert of_step[-1] == paths.COMMITTED
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
    (buckets.Bucket.flip, "digest mismatch in variables/"),
    (lambda bucket, name: bucket.delete(name), "missing"),
    (lambda bucket, name: bucket.write(name, b""), "digest mismatch"),
])
def test_a_damaged_step_is_named_put_aside_and_the_one_before_is_used(
    saved, capsys, harm, reason
):
    before = saved.names("runs/one/checkpoints/20/")
    name = saved.largest(f"{FOLDER}/20/variables/")
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
        saved.flip(saved.largest(f"{FOLDER}/{step}/optimizer/"))
    there = saved.names()
    with pytest.raises(checkpointer.RestoreError, match="2 checkpoint.*none can be"):
        reopen().restore_latest(abstract(make_state(2)))
    assert saved.names() == there


def test_a_save_that_ends_before_the_commit_is_no_step(saved, capsys):
    saved.refused = f"/30/{paths.COMMITTED}"
    checkpoints = reopen()
    with pytest.raises(Exception, match="(?i)forbidden|not allowed"):
        checkpoints.save(30, make_state(3), wait=True)
    saved.refused = None
    assert saved.names("runs/one/checkpoints/30/variables/")
    assert checkpoints.steps() == [10, 20]
    assert checkpointer.newest_step(STEPS) == 20
    again = reopen()
    assert f"{STEPS}/30 was never completed" in capsys.readouterr().out
    assert again.restore_latest(abstract(make_state(2)))[0] == 20
    again.save(30, make_state(3), wait=True)
    again.close()
    assert_same(reopen().restore_latest(abstract(make_state(3)))[1], make_state(3))


def test_an_end_while_a_step_is_put_aside_loses_no_step(saved, monkeypatch):
    saved.flip(saved.largest(f"{FOLDER}/20/variables/"))

    def fail(path):
        raise OSError(f"{path}: the host died")

    monkeypatch.setattr(paths.system(RUN), "rm_file", fail)
    with pytest.raises(OSError, match="the host died"):
        reopen().restore_latest(abstract(make_state(2)))
    monkeypatch.undo()
    assert reopen().restore_latest(abstract(make_state(2)))[0] == 10
    assert saved.names("runs/one/checkpoints/20.damaged2/")


def test_checkpoints_in_a_bucket_are_listed_verified_and_pruned(saved, capsys):
    config = tiny.config("none")
    saved.write("runs/one/config.json", config.to_json().encode())
    saved.write("runs/one/notes.txt", b"mine")
    saved.write("runs/one/checkpoints/mine/1", b"mine")
    for name in saved.names("runs/one/checkpoints/10/"):
        saved.write(name.replace("/10/", "/best/"), saved.read(name))
    saved.refused = f"/30/{paths.COMMITTED}"
    checkpoints = checkpointer.Checkpoints(STEPS, keep=9)
    with pytest.raises(Exception, match="(?i)forbidden|not allowed"):
        checkpoints.save(30, make_state(3), wait=True)
    saved.refused = None

    def call(*arguments):
        status = command.main([*arguments])
        return status, capsys.readouterr()

    status, (out, _) = call("ls", RUN)
    assert status == 0 and out.startswith(f"{STEPS}\npretrain: encoder vit W16-D2")
    assert "GB are free" not in out  # of a bucket nobody knows
    size = sum(len(saved.read(name)) for name in saved.names("runs/one/checkpoints/10"))
    cells = [line.split("|")[1:-1] for line in out.splitlines()[4:-1]]
    cells = [[cell.strip() for cell in line] for line in cells]
    assert cells[0] == ["10", space.shown(size), "complete"]
    assert cells[2][0] == "30" and cells[2][2] == "never completed"
    assert call("verify", STEPS)[0] == 0
    assert "params/encoder/kernel" in call("inspect", RUN)[1].out
    saved.flip(saved.largest(f"{FOLDER}/20/optimizer/"))
    status, (out, _) = call("verify", RUN)
    assert status == 1 and "damaged: digest mismatch in optimizer/" in out
    # The newest one that is whole is the other: nothing but the torn save may go.
    status, (out, _) = call("prune", RUN, "--keep=1", "--yes")
    assert status == 0 and "Deleted 1 of" in out
    assert not saved.names("runs/one/checkpoints/30/")
    saved.flip(saved.largest(f"{FOLDER}/20/optimizer/"))  # mended
    status, (out, _) = call("prune", RUN, "--keep=1", "--yes")
    assert status == 0 and "delete  10  " in out
    assert checkpointer.newest_step(STEPS) == 20
    left = {name.split("/")[2] for name in saved.names("runs/one/")}
    assert left == {"config.json", "notes.txt", "checkpoints"}
    steps = {name.split("/")[3] for name in saved.names("runs/one/checkpoints/")}
    assert steps == {"20", "best", "mine"}


def test_another_model_is_a_mismatch(saved):
    with pytest.raises(checkpointer.MismatchError, match="other shape"):
        reopen().restore_latest(abstract(make_state(2, width=5)))


def test_files_of_a_run_come_and_go(bucket, capsys):
    with mirror.opened(RUN) as home:
        assert home.local != home.path and not list(home.local.iterdir())
        (home.local / "panels").mkdir()
        (home.local / "panels" / "1.png").write_bytes(b"picture")
        paths.write_whole(home.local / "config.json", "{}")
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
        found = sorted(map(home.name, paths.files(home.local)))
        assert [str(path) for path in found] == [
            f"{RUN}/{name}" for name in ("best/best.json", "config.json",
                                         "metrics.jsonl")
        ]
        (home.local / "metrics.jsonl").write_text("longer")
        raise KeyError
    assert bucket.read("runs/one/metrics.jsonl") == b"longer"


def lines(bucket):
    text = bucket.read("runs/one/metrics.jsonl").decode()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_in_a_bucket_goes_on_and_can_be_read(bucket, digits_dir, capsys):
    bucket.put("data", digits.prepare(digits_dir))
    config = tiny.config(
        f"gs://{buckets.NAME}/data", epochs=0.6, optim__warmup_epochs=0.1,
        checkpoint__best="eval/reconstruction/mse",
        evals=dict(reconstruction=dict(every_epochs=0.0, num_images=3)),
    )
    config.data.update(source="tfds", name=digits.NAME)
    found = train.run(config, RUN)
    printed = capsys.readouterr().out
    assert f"FRESH START in {RUN} (--resume=auto)\n" in printed
    assert f"metrics      {RUN}/metrics.jsonl\n" in printed
    written, curve = lines(bucket), checkpointer.restore_variables(STEPS, step=9)
    for name in (
        "config.json", "dataset.json", "environment.json", "time.json", "curve.png",
        "panels/step_00000009.png", "best/best.json", "best/config.json",
        "results.json",
    ):
        assert bucket.read(f"runs/one/{name}"), name
    assert bucket.names("runs/one/tensorboard/events")
    assert json.loads(bucket.read("runs/one/best/best.json"))["step"] == (
        found["best/step"]
    )
    # Whoever reads a checkpoint finds the lines up to it.
    order = bucket.written
    for step in (6, 9):
        committed = order.index(f"runs/one/checkpoints/{step}/{paths.COMMITTED}")
        assert "runs/one/metrics.jsonl" in order[:committed]
        assert "runs/one/config.json" in order[:committed]

    page = bucket.read("runs/one/report.html").decode()
    assert f"report       {RUN}/report.html\n" in printed
    assert "Finished: step 9 of 9" in page and f"{RUN}/checkpoints" in page
    assert page.count("data:image/png;base64,") == 1
    bucket.delete("runs/one/report.html")
    assert os.fspath(run_page.write(RUN)) == f"{RUN}/report.html"
    again = bucket.read("runs/one/report.html").decode()
    assert again.partition("<footer>")[0] == page.partition("<footer>")[0]

    # As if the host had died while the last step was saved.
    bucket.delete(f"runs/one/checkpoints/9/{paths.COMMITTED}")
    again = train.run(config, RUN)
    assert f"RESUMED at step 6 of 9 from {RUN}\n" in capsys.readouterr().out
    assert bits(checkpointer.restore_variables(STEPS)) == bits(curve)
    assert again["train/loss"] == found["train/loss"]
    steps = [line["step"] for line in lines(bucket) if "train/loss" in line]
    assert steps == [line["step"] for line in written if "train/loss" in line]

    with pytest.raises(errors.SetupError, match=f"{RUN} holds checkpoints of another"):
        train.run(tiny.config(digits_dir, seed=5), RUN)
    assert workdir.is_run(RUN) and workdir.read_config(RUN).seed == config.seed
    encoder = crossmae_jax.load(f"{RUN}/best")
    assert encoder.card.origin == f"{RUN}/best"
    assert np.isfinite(encoder(np.zeros((1, 16, 16, 1), np.uint8))).all()
    like = jax.eval_shape(objectives.make(config).init, jax.random.key(0))
    plan = starting.plan(RUN, like, config)  # config.init_from
    assert not plan.new and RUN in "\n".join(plan.report)


def test_a_step_to_make_again_is_kept_in_the_bucket(bucket, digits_dir):
    config = tiny.config(digits_dir)
    state = train.TrainState(
        jax.numpy.asarray(2), {"params": {"w": jax.numpy.arange(3.0)}}, (),
        {"total": jax.numpy.asarray(1), "in_a_row": jax.numpy.asarray(1)},
    )
    with mirror.opened(RUN) as home:
        error = replay.kept(
            journal.NotFinite("Not finite."), home, config,
            sources.make_source(config.data, "train"), state, key=jax.random.key(0),
        )
    assert f"debug-nan {RUN}/nan_step_2.npz names" in str(error)
    kept = replay.read(f"{RUN}/nan_step_2.npz")
    assert (kept.step, kept.config.seed) == (2, config.seed)
    np.testing.assert_array_equal(kept.variables["params"]["w"], [0, 1, 2])


def test_images_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
    bucket.put("sets/train", write_folder(tmp_path / "train", 20))
    bucket.write("sets/train2/else.png", b"")
    bucket.write("sets/train/.hidden/x.png", b"")
    bucket.write("sets/train/.y.png", b"")
    bucket.write("sets/train/notes.txt", b"")
    local = sources.FolderSource(str(tmp_path / "train"))
    source = sources.FolderSource(f"gs://{buckets.NAME}/sets/train/")
    assert (len(source), source.classes, source.fingerprint) == (
        len(local), local.classes, local.fingerprint
    )
    for k in (0, 19):
        ours, theirs = source[k], local[k]
        assert ours["image"] == theirs["image"] and ours["label"] == theirs["label"]
        assert ours["name"] == theirs["name"].replace(
            str(tmp_path), f"gs://{buckets.NAME}/sets"
        )
    assert source.skipped == (
        "1 .txt (no kind of image that is read), 2 whose names begin with a dot"
    )
    assert len(pickle.dumps(source)) < 2000
    data = settings(batch_size=10, image_size=(16, 16))
    batches = []
    for opened, data.workers in ((local, 0), (source, 0), (source, 1)):
        with pipeline.train_batches(
            opened, data, seed=3, start_step=0, num_steps=2
        ) as loaded:
            batches.append([batch["image"].tobytes() for batch in loaded])
    assert batches[0] == batches[1] == batches[2]
    bucket.write("sets/train/empty/.x.png", b"")
    with pytest.raises(ValueError, match="image that is read lies in 'empty'"):
        sources.FolderSource(f"gs://{buckets.NAME}/sets/train/")


def test_reading_images_in_a_bucket_imports_no_jax(bucket, tmp_path):
    bucket.put("sets/train", write_folder(tmp_path / "train", 2))
    code = (
        "import sys\nfrom crossmae_jax.data import sources\n"
        f"source = sources.FolderSource('gs://{buckets.NAME}/sets/train')\n"
        "assert source[0]['image']\nassert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_what_is_not_in_the_bucket_is_named(bucket, tmp_path):
    place = f"gs://{buckets.NAME}"
    bucket.write("sets/text/a.txt", b"")
    for folder, message in (
        ("none", "none does not exist"), ("text", "No images under.*1 .txt"),
        ("text/a.txt", "is an object"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.FolderSource(f"{place}/sets/{folder}")
    data = settings(source="tfds", name="no_such_set", data_dir=f"{place}/sets")
    with pytest.raises(ValueError, match=f"under {place}/sets: .*Found there: text"):
        sources.make_source(data, "train")
    with pytest.raises(checkpointer.RestoreError, match="there is no such directory"):
        checkpointer.newest_step(STEPS)
    with pytest.raises(ConversionError, match=f"No weights at {place}/none"):
        crossmae_jax.load(f"{place}/none")
    for name in ("weights.safetensors", "folder/model.safetensors"):
        bucket.write(name, b"")
        with pytest.raises(ConversionError, match="Copy it first: gcloud storage cp"):
            crossmae_jax.load(f"{place}/{name.partition('/')[0]}")
