"""Directories that are somebody else's, or no place to write, are left alone."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from configs import digits_cross
from crossmae_jax import errors, sweep, train
from crossmae_jax.evals import report
from crossmae_jax.runs import ownership, workdir
from tests.test_classify import make_config

HUGGING_FACE = {
    "config.json": '{"model_type": "vit_mae", "architectures": ["ViTMAEModel"]}',
    "results.json": '{"accuracy": 0.9}', "report.html": "<p>mine</p>",
    "model.safetensors": "weights",
}
FOREIGN = {
    "transformers": HUGGING_FACE,
    "a README": {"README.md": "mine"},
    "results": {"results.json": "[1]", "train.log": ""},
    "checkpoints of others": {"checkpoints/epoch_1.pth": "x", "args.json": "{}"},
    "settings of others": {"config.json": '{"data": 1, "model": 2}'},
    "a report of others": {"evaluation.json": '{"metrics": {}}'},
    "a sweep of others": {"sweep.json": '{"program": "train.py"}'},
}


def fill(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*")) if path.is_file()
    }


def a_report():
    config = json.loads(digits_cross.get_config().to_json())
    return report.Report({"path": "x", "step": 1, "sha256": "s"}, config)


WRITERS = {
    "a run": lambda place: train.run(digits_cross.get_config(), place),
    "a sweep": lambda place: sweep.run(make_config(), place, blocks=[0.0]),
    "an evaluation": lambda place: report.begun(place, a_report()),
}


@pytest.mark.parametrize("title", WRITERS)
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_the_folder_of_somebody_else_is_refused_and_untouched(tmp_path, files, title):
    fill(tmp_path, files)
    before = contents(tmp_path)
    with errors.setting_up(), pytest.raises(errors.SetupError) as refused:
        WRITERS[title](tmp_path)
    message = str(refused.value)
    assert f"{tmp_path} is not empty and not {title} of ours" in message
    assert sorted(files)[0].split("/")[0] in message and "--workdir" in message
    assert contents(tmp_path) == before


def test_what_a_launch_leaves_that_was_cut_short_is_ours(tmp_path):
    fill(tmp_path, {"run.lock": "{}", "train.log": "host 0/1", ".gitkeep": ""})
    (tmp_path / "checkpoints").mkdir()
    workdir.check_ours(tmp_path)
    workdir.check_ours(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(errors.SetupError, match="left alone: notes.txt"):
        workdir.check_ours(tmp_path)


def test_a_directory_belongs_to_its_own_kind(tmp_path):
    config = digits_cross.get_config()
    workdir.claim(tmp_path / "run", config, dataset={}, resuming=False)
    (tmp_path / "run" / "found.json").touch()  # what people put beside a run
    workdir.check_ours(tmp_path / "run")
    report.begun(tmp_path / "run", a_report())  # a run may hold its evaluation
    fill(tmp_path / "listed", {"bad_images.jsonl": ""})
    report.begun(tmp_path / "listed", a_report())
    a_report().write(tmp_path / "report")
    assert report.begun(tmp_path / "report", a_report()) == a_report()
    for place in ("report", "listed"):
        with pytest.raises(errors.SetupError, match="not a run of ours"):
            workdir.check_ours(tmp_path / place)


def test_a_report_that_is_damaged_is_named(tmp_path):
    a_report().write(tmp_path)
    path = tmp_path / "evaluation.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(errors.SetupError, match="evaluation.json is damaged .*--work"):
        report.begun(tmp_path, a_report())
    path.unlink()  # as the error says; evaluation.md stays
    assert report.begun(tmp_path, a_report()) == a_report()


def test_a_sweep_that_is_damaged_is_named(tmp_path):
    for text in ('{"init_from": "", "accu', '{"init_from": "", "accuracy": {"0": ""}}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(errors.SetupError, match="sweep.json is .*; remove it and"):
            sweep.run(make_config(), tmp_path, blocks=[0.0])
        assert (tmp_path / "sweep.json").read_text() == text
    (tmp_path / "sweep.json").unlink()
    (tmp_path / sweep.PICTURE).touch()
    ownership.check(tmp_path, [sweep.SWEEP])


@pytest.mark.parametrize("below", ["", "run"])
@pytest.mark.parametrize("title", WRITERS)
def test_a_file_is_no_workdir(tmp_path, title, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with errors.setting_up(), pytest.raises(errors.FileError) as refused:
        WRITERS[title](file / below)
    assert f"{file} is a file, no directory; give" in str(refused.value)
    assert file.read_text() == "mine"


@pytest.fixture
def unprivileged():
    """Somebody who may not write everywhere; and a directory where they may look."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        before = os.geteuid()
        if before == 0:
            os.chown(directory, 65534, -1)
            os.seteuid(65534)
        yield Path(directory)
        os.seteuid(before)


@pytest.mark.parametrize("title", WRITERS)
def test_a_read_only_directory_is_named_before_anything_is_done(unprivileged, title):
    place = unprivileged / "run"
    place.mkdir()
    place.chmod(0o555)
    for directory in (place, place / "new" / "one"):
        with errors.setting_up(), pytest.raises(errors.FileError) as refused:
            WRITERS[title](directory)
        assert f"{place} cannot be written: it is read-only" in str(refused.value)


def test_checkpoints_that_are_read_only_are_named_before_the_training(unprivileged):
    fill(unprivileged, {"config.json": digits_cross.get_config().to_json()})
    (unprivileged / "checkpoints").mkdir(0o555)
    with pytest.raises(errors.FileError, match="checkpoints cannot be written"):
        workdir.check_ours(unprivileged)
    # A file that is protected is replaced whole, and no hindrance.
    (unprivileged / "checkpoints").chmod(0o755)
    (unprivileged / "config.json").chmod(0o444)
    workdir.check_ours(unprivileged)
    assert json.loads((unprivileged / "config.json").read_text())["seed"] == 0
