"""The small files of a run and of a data set, changed at random: read, or refused.

As in `test_fuzz`; what was found stands below as ordinary tests.
"""

import copy
import json
import shutil

import pytest

from crossmae_jax import errors, sweep
from crossmae_jax.checkpoints import digests
from crossmae_jax.data import bad_images, sources
from crossmae_jax.data.sets import digits
from crossmae_jax.report import run_page
from crossmae_jax.runs import lock, metrics, records, workdir
from tests.fuzzing import (
    ODD_JSON,
    edited,
    edited_tree,
    edits,
    fuzzed,
    json_edits,
    refused_with,
    text_of,
)
from tests.saved_runs import tiny_config


# A workdir.


@pytest.fixture(scope="module")
def run_files():
    """The small files of a run that was made, as trees and as bytes."""
    config = json.loads(tiny_config("digits_cross").to_json())
    return {
        "config.json": config,
        "dataset.json": {
            "num_images": 40, "fingerprint": "40-ab", "classes": ["a", "b"],
            "content": "0:ab 1:cd",
        },
        "environment.json": {
            "versions": {"jax": "1"}, "devices": ["cpu", "cpu"], "processes": 1,
            "command": ["python", "-m", "x"],
        },
        "time.json": {
            "seconds": {
                "steps": 1.5, "data": 0.1, "compile": 2.0, "evaluate": 0.5,
                "save": 0.1, "start": 1.0, "restart": 0.0,
            },
            "until": 1.7e9, "saved_steps": 1.5, "finished": True,
        },
        "results.json": {
            "train/loss": 0.5, "eval/knn/top1": 0.5, "pixels/knn/top1": 0.25,
            "eval/accuracy/top1": 0.5, "eval/accuracy/images": 10,
        },
        "best/best.json": {
            "metric": "eval/knn/top1", "value": 0.5, "step": 2, "higher": True,
        },
    }


METRICS = b"".join(
    json.dumps({"step": step, "train/loss": 1 / step, "train/epoch": 0.5 * step})
    .encode() + b"\n" for step in range(1, 6)
)


@pytest.fixture
def run(run_files, tmp_path):
    for name, tree in run_files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text_of(tree))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(METRICS)
    return tmp_path


def _read_run(path):
    """Reads all that there is to read of a run; a page can always be made of it."""
    with refused_with(errors.UserError, FileNotFoundError):
        workdir.read_config(path)
    with refused_with(errors.UserError):
        workdir.read_classes(path)
    with refused_with(ValueError):
        metrics.rows(path / "metrics.jsonl")
    with refused_with(ValueError):
        metrics.curves(path / "metrics.jsonl")
    with refused_with(errors.UserError):
        run_page.write(path)


RUN_FILES = (
    "config.json", "dataset.json", "environment.json", "time.json", "results.json",
    "best/best.json",
)


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_a_run(run, run_files, name, capsys):
    (run / "metrics.jsonl").write_bytes(b"")  # whose curves take time to draw

    @fuzzed(60, changes=json_edits)
    def change(changes):
        (run / name).write_bytes(text_of(edited_tree(run_files[name], changes)))
        _read_run(run)

    change()


@pytest.mark.parametrize("text", ODD_JSON, ids=range(len(ODD_JSON)))
def test_files_of_a_run_that_are_no_json(run, text):
    (run / "metrics.jsonl").write_bytes(b"")
    for name in RUN_FILES:
        (run / name).write_bytes(text)
        _read_run(run)


def test_metrics(run):
    @fuzzed(25, changes=edits)
    def change(changes):
        (run / "metrics.jsonl").write_bytes(edited(METRICS, changes))
        _read_run(run)

    change()


@pytest.mark.parametrize("line", [
    b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 400 + b', "a": 1}',
    b'{"step": 1, "a": ' + b"9" * 400 + b"}", b'{"step": 1, "a": 1e999}',
    b'{"step": -5, "\\ud800": 1}', b'{"step": true, "train/loss": false}', *ODD_JSON,
])
def test_odd_lines_of_metrics(run, line):
    (run / "metrics.jsonl").write_bytes(METRICS + line + b"\n")
    _read_run(run)


def test_lists_of_bad_images(tmp_path):
    listed = bad_images.BadImages(5, 1.0, str(tmp_path))
    listed.add(3, [bad_images.Bad(f"a/{k}.png", "cut short", k, k) for k in range(3)])
    path = tmp_path / "bad_images.jsonl"
    whole = path.read_bytes()

    class Source:
        def __len__(self):
            return 5

        def name(self, index):
            return f"a/{index}.png"

    @fuzzed(150, changes=edits)
    def change(changes):
        path.write_bytes(edited(whole, changes))
        with refused_with():
            bad_images.listed(tmp_path)
            again = bad_images.BadImages(5, 1.0, str(tmp_path))
            again.resume(Source(), 10, lambda index: 1)
            again.add(1, [bad_images.Bad("a/4.png", "cut", 4, 4)])

    change()


def test_lists_of_digests(tmp_path):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (tmp_path / "part" / name).write_text(name)
    digests.write(tmp_path)
    whole = (tmp_path / digests.LIST).read_bytes()
    assert digests.damage(tmp_path, ("part",)) is None

    @fuzzed(150, changes=edits)
    def change(changes):
        content = edited(whole, changes)
        (tmp_path / digests.LIST).write_bytes(content)
        with refused_with():
            found = digests.damage(tmp_path, ("part",))
            assert found or set(content.split()) == set(whole.split())

    change()


# A TFDS data set.


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    prepared = digits.prepare(str(tmp_path_factory.mktemp("digits")))
    folder = tmp_path_factory.mktemp("sets") / digits.NAME / "1.0.0"
    shutil.copytree(f"{prepared}/{digits.NAME}/1.0.0", folder)
    return folder


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_metadata_of_a_tfds_set(tfds_set, name):
    whole = (tfds_set / name).read_bytes()
    tree = json.loads(whole)

    def check(content):
        (tfds_set / name).write_bytes(content)
        with refused_with(ValueError):
            source = sources.TfdsSource(
                digits.NAME, data_dir=str(tfds_set.parent.parent), split="train"
            )
            assert len(source) >= 0 and source.name(0)

    @fuzzed(60, changes=json_edits)
    def change_tree(changes):
        check(text_of(edited_tree(tree, changes)))

    @fuzzed(30, changes=edits)
    def change_bytes(changes):
        check(edited(whole, changes))

    try:
        change_tree()
        change_bytes()
        for text in ODD_JSON:
            check(text)
    finally:
        (tfds_set / name).write_bytes(whole)


# What was found so far, by its smallest input.


@pytest.mark.parametrize("change", [
    lambda config: config.update(model={"decoder": None}),
    lambda config: config["data"].update(batch_size="8"),
    lambda config: config["model"].pop("encoder"),
])
def test_a_configuration_of_other_kinds_is_refused(run, run_files, change):
    config = copy.deepcopy(run_files["config.json"])
    change(config)
    (run / "config.json").write_bytes(text_of(config))
    with pytest.raises(errors.SetupError, match="config.json is damaged"):
        workdir.read_config(run)
    with pytest.raises(errors.SetupError, match="config.json is damaged"):
        run_page.write(run)


def test_classes_that_are_no_names_are_refused(run):
    (run / "dataset.json").write_text('{"classes": [null, "b"]}')
    with pytest.raises(errors.SetupError, match="its classes are no list of names"):
        workdir.read_classes(run)


@pytest.mark.parametrize("name, content", [
    ("dataset.json", {"num_images": None}),
    ("environment.json", {"versions": None}),
    ("environment.json", {"devices": [[]]}),
    ("time.json", {"seconds": None}),
    ("time.json", {
        "seconds": {"steps": 1.0}, "saved_steps": 1.0, "until": 1e300,
        "finished": False,
    }),
    ("best/best.json", {"metric": None, "value": 1, "step": 1}),
])
def test_a_page_leaves_out_what_is_none_of_ours(run, capsys, name, content):
    (run / name).write_text(json.dumps(content))
    (run / "metrics.jsonl").write_bytes(b"")
    run_page.write(run)
    assert f"{run / name} is damaged (not what is written there" in (
        capsys.readouterr().out
    )


def test_a_page_does_without_the_number_of_images_of_an_accuracy(run, run_files):
    results = dict(run_files["results.json"])
    del results["eval/accuracy/images"]
    (run / "results.json").write_bytes(text_of(results))
    assert "Accuracy, top-1" in run_page.write(run).read_text()


@pytest.mark.parametrize("line", [
    b'{"step": ' + b"9" * 400 + b"}", b'{"step": 1, "a": ' + b"9" * 400 + b"}",
    b'{"step": -5}', b'{"step": true}',
])
def test_numbers_that_nothing_can_be_computed_with_are_no_metrics(run, line):
    (run / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1 is not an object with a step"):
        metrics.rows(run / "metrics.jsonl")


def test_a_tfds_set_whose_metadata_is_none_is_refused(tfds_set):
    path = tfds_set / "dataset_info.json"
    whole = path.read_bytes()
    path.write_text('{"supervisedKeys": {"tuple": {"items": [null]}}}')
    try:
        with pytest.raises(ValueError, match="'sklearn_digits' .* cannot be read"):
            sources.TfdsSource(
                digits.NAME, data_dir=str(tfds_set.parent.parent), split="train"
            )
    finally:
        path.write_bytes(whole)


def test_locks(tmp_path, monkeypatch, capsys):
    """A file that says nothing of a run is taken over, of one that lives is obeyed."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    file = tmp_path / lock.FILE
    with lock.held(tmp_path):
        written = records.read(file, cure="none")

    @fuzzed(150, changes=json_edits)
    def change(changes):
        file.write_bytes(text_of(edited_tree(written, changes)))
        with refused_with(errors.SetupError), lock.held(tmp_path):
            pass

    change()
    for text in ODD_JSON:
        file.write_bytes(text)
        with lock.held(tmp_path):
            pass


def test_sweeps(tmp_path):
    file = tmp_path / sweep.RESULT
    written = {"init_from": "a/run", "metric": "top1", "accuracy": {"0.5": 0.1, "1": 1}}

    @fuzzed(150, changes=json_edits)
    def change(changes):
        file.write_bytes(text_of(edited_tree(written, changes)))
        with refused_with(errors.UserError):
            sweep.table(sweep.read(tmp_path))

    change()
    for text in ODD_JSON:
        file.write_bytes(text)
        with refused_with(errors.UserError):
            sweep.read(tmp_path)
