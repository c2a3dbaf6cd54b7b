"""What the files of a TFDS set may name: nothing that runs, and nothing elsewhere."""

import json
import pickle
import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from crossmae_jax import errors
from crossmae_jax.data import sources
from crossmae_jax.data.sets import digits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return digits.prepare(str(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def version(prepared, tmp_path):
    """A set of which there is no code, only files."""
    version = tmp_path / "sets" / "strange" / "1.0.0"
    shutil.copytree(f"{prepared}/{digits.NAME}/1.0.0", version)
    for shard in version.glob("*.array_record-*"):
        shard.rename(version / shard.name.replace(digits.NAME, "strange"))
    _change(version / "dataset_info.json", lambda info: info.update(name="strange"))
    return version


def _opened(version):
    directory = str(version.parent.parent)
    return sources.TfdsSource("strange", data_dir=directory, split="train")


def _change(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("where", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("place", ["top", "nested"])
def test_files_of_a_set_import_nothing(version, monkeypatch, tmp_path, where, place):
    (tmp_path / "stranger.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = json.loads((version / "features.json").read_text())
    inner = named if place == "top" else named["featuresDict"]["features"]["label"]
    inner["pythonClassName"] = "stranger.Feature"
    if where == "features.json":
        (version / where).write_text(json.dumps(named))
    else:
        _change(version / where, lambda info: info.update(features=named))
    with pytest.raises(errors.SetupError) as caught:
        _opened(version)
    assert "name the feature 'stranger.Feature', for which code" in str(caught.value)
    assert "stranger" not in sys.modules


def test_a_worker_looks_at_the_names_too(version):
    source = pickle.loads(pickle.dumps(_opened(version)))
    _change(
        version / "features.json",
        lambda named: named.update(pythonClassName="stranger.Feature"),
    )
    with pytest.raises(errors.SetupError, match="'stranger.Feature'"):
        source[0]
    # Elsewhere TFDS is as it was.
    with pytest.raises(ValueError, match="Could not import stranger"):
        tfds.builder_from_directory(source.directory)


@pytest.mark.parametrize("template", [
    "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "part/../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    "/elsewhere/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
])
def test_shards_outside_of_the_set_are_not_read(version, template):
    def change(info):
        for split in info["splits"]:
            split["filepathTemplate"] = template

    _change(version / "dataset_info.json", change)
    with pytest.raises(errors.SetupError, match="names the shard .*; expected a file"):
        _opened(version)


def test_shards_may_lie_in_folders_of_the_set(version):
    before = _opened(version)[7]
    (version / "deep").mkdir()
    for shard in version.glob("*.array_record-*"):
        shard.rename(version / "deep" / shard.name)
    _change(version / "dataset_info.json", lambda info: [
        split.update(filepathTemplate="deep/" + split["filepathTemplate"])
        for split in info["splits"]
    ])
    assert _opened(version)[7] == before
