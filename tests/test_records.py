"""Small files of a workdir that somebody has cut, edited or overwritten."""

import json
import os

import pytest

from configs import digits_cross
from crossmae_jax import errors, paths
from crossmae_jax.runs import reading, records, workdir

DATASET = {"num_images": 9, "fingerprint": "a", "classes": ["x", "y"]}
DAMAGED = {
    "empty": b"", "cut": b'{"seed": 0, "data": {"sou', "a list": b"[]",
    "binary": b"\xff\xfe\x00\x80", "deep": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' * 100 + b"1" + b"}" * 100,
}


@pytest.fixture
def run(tmp_path):
    """A workdir that a run has claimed."""
    workdir.claim(
        tmp_path, digits_cross.get_config(), dataset=DATASET, resuming=False
    )
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
def test_what_a_run_cannot_do_without_is_named_with_the_cure(run, name, damage):
    (run / name).write_bytes(damage)
    config = digits_cross.get_config()
    readers = {"config.json": workdir.read_config, "dataset.json": workdir.read_classes}
    for read in (
        readers[name],
        lambda run: workdir.claim(run, config, dataset=DATASET, resuming=True),
    ):
        with pytest.raises(errors.SetupError) as refused:
            read(run)
        message = str(refused.value)
        assert f"{run / name} is damaged (" in message and len(message) < 400
        assert "put back a copy" in message and "--workdir" in message
    assert (run / name).read_bytes() == damage


@pytest.mark.parametrize("change", [
    {"model": 3}, {"optim": None}, {"epochs": "all"}, {"seed": []},
])
def test_the_configuration_of_something_else_is_none_of_ours(run, change):
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(errors.SetupError, match=f"of a run: {[*change][0]} missing"):
        workdir.read_config(run)


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_run_is_read_without_what_only_tells_more_of_it(run, damage, capsys):
    names = ("time.json", "environment.json", "dataset.json")
    for name in names:
        (run / name).write_bytes(damage)
    told = reading.read(run)
    assert (told.time, told.environment, told.dataset) == ({}, {}, {})
    assert told.config["seed"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for name in names:
        assert any(line.startswith(f"{run / name} is damaged (") for line in lines)


def test_a_missing_file_is_no_damage(tmp_path, capsys):
    assert records.recalled(tmp_path / "time.json", then="it is left out") is None
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "time.json", cure="")


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), 1e999, 10**400])
def test_what_is_no_number(value):
    assert records.is_number(0) and records.is_number(-1.5)
    assert not records.is_number(value)


def test_a_text_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    file, synced, original = tmp_path / "a.json", [], os.fsync
    file.write_text("old")

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_size, file.read_text()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    paths.write_whole(file, "the new text")
    assert synced == [(12, "old")] and file.read_text() == "the new text"
    assert list(tmp_path.iterdir()) == [file]
