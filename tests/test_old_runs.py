"""Runs of an older version go on, load, are evaluated and compared as they were.

They are of commit fea6aa0, whose settings of a model lay side by side: see
tests/old_runs/README.md.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import crossmae_jax
from benchmarks import step
from crossmae_jax import train
from crossmae_jax.evals import of_checkpoint, report
from crossmae_jax.report import run_page
from crossmae_jax.runs import compare, workdir

OLD = Path(__file__).parent / "old_runs"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# Sums in another order, on another machine or number of devices: measured 4.2e-7.
TOLERANCE = 5e-6

_TINY = [
    "log_every_steps=1", "checkpoint.keep=1", "data.batch_size=64",
    "optim.warmup_epochs=0.2", "model.encoder.mlp_ratio=2.0",
]
_MASKED = [
    "baselines=False", "model.decoder.dim=16", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "model.decoder.mlp_ratio=2.0",
]
# The commands that the runs were started with, in today's words.
COMMANDS = {
    "prmim_interrupted": ("digits_cross_prmim", [
        *_TINY, *_MASKED, "model.encoder.size=W16-D2-H2/4", "epochs=2.0",
    ]),
    "mae_finished": ("digits_mae", [
        *_TINY, *_MASKED, "model.encoder.size=W16-D1-H2/4", "epochs=0.5",
    ]),
    "classifier_finished": ("finetune_digits", [
        *_TINY, "model.encoder.size=W16-D1-H2/4", "epochs=0.5",
        "data.num_classes=10",
    ]),
}
NAMES = tuple(COMMANDS)


@pytest.fixture
def unpacked(tmp_path):
    """Returns a function that makes the workdir of an old run."""

    def unpack(name):
        with tarfile.open(OLD / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


def _config(name, digits_dir, *overrides):
    path, settings = COMMANDS[name]
    return step.load_config(f"configs/{path}.py", overrides=[
        *settings, f"data.data_dir={digits_dir}", *overrides
    ])


def _lines(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def test_an_interrupted_run_goes_on_as_its_own_version_went_on(
    unpacked, digits_dir, capsys
):
    directory = unpacked("prmim_interrupted")
    before = _lines(directory)
    config = _config("prmim_interrupted", digits_dir)
    config.evals = {}
    train.run(config, directory)
    assert "\nRESUMED at step 22 of 45 from " in capsys.readouterr().out
    lines = _lines(directory)
    assert list(lines) == list(range(1, 46))
    assert all(lines[number] == before[number] for number in range(1, 23))
    for number, expected in EXPECTED["steps"].items():
        for name, value in expected.items():
            np.testing.assert_allclose(
                lines[int(number)][name], value, rtol=TOLERANCE, err_msg=name
            )
    # From now on it is a run of this version.
    stored = json.loads((directory / "config.json").read_text())
    assert stored["model"]["decoder"]["dim"] == 16
    assert "decoder_dim" not in stored["model"]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_is_no_other_run(name, unpacked, digits_dir):
    directory, config = unpacked(name), _config(name, digits_dir)
    dataset = json.loads((directory / "dataset.json").read_text())
    stored = json.loads((directory / "config.json").read_text())
    assert isinstance(stored["model"]["size"], str)
    old = json.loads(workdir.read_config(directory).to_json())
    assert workdir.differing(old, json.loads(config.to_json())) == {}
    changed = config.copy_and_resolve_references()
    changed.model.encoder.size = "W32-D1-H2/4"
    with pytest.raises(ValueError, match=r"model.encoder.size: 'W16-D\d-H2/4' -> 'W32"):
        workdir.claim(directory, changed, dataset=dataset, resuming=True)
    workdir.claim(directory, config, dataset=dataset, resuming=True)


@pytest.mark.parametrize("name, parts", [
    ("prmim_interrupted", ["encoder", "fusion", "decoder", "aggregator"]),
    ("mae_finished", ["encoder", "decoder"]),
    ("classifier_finished", ["encoder", "fc_norm", "head"]),
    ("classifier_finished/best", ["encoder", "fc_norm", "head"]),
])
def test_an_old_run_loads(name, parts, unpacked):
    first, _, rest = name.partition("/")
    model = crossmae_jax.load(unpacked(first) / rest)
    assert model.card.parts == parts
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    assert np.isfinite(model.encode(images)).all()
    if "decoder" in parts:
        assert model.card.model["decoder"]["dim"] == 16
        assert np.isfinite(model.reconstruct(images).prediction).all()
    else:
        assert model.logits(images).shape == (2, 10)


@pytest.mark.parametrize("name, suite, metric", [
    ("mae_finished", "knn", "knn/mean/k20/top1"),
    ("classifier_finished", "accuracy", "accuracy/top1"),
])
def test_an_old_run_is_evaluated_to_what_it_found(
    name, suite, metric, unpacked, digits_dir
):
    directory = unpacked(name)
    config = workdir.read_config(directory)
    config.data.data_dir = digits_dir
    options = {suite: dict(config.evals[suite])}
    del options[suite]["every_epochs"]
    made = of_checkpoint.open_checkpoint(directory, config)
    found = of_checkpoint.run(made, [suite], directory / "again", options=options)
    results = json.loads((directory / "results.json").read_text())
    assert found.metrics[metric] == pytest.approx(results[f"eval/{metric}"], abs=1e-9)
    # A report that the old version began is added to.
    path = directory / "again" / report.JSON
    begun = json.loads(path.read_text())
    stored = json.loads((directory / "config.json").read_text())
    path.write_text(json.dumps(
        begun | {"config": begun["config"] | {"model": stored["model"]}}
    ))
    assert report.begun(path.parent, found).metrics == found.metrics


def test_an_old_run_is_compared_with_a_new_one_of_the_same_settings(
    unpacked, digits_dir, tmp_path
):
    old = unpacked("prmim_interrupted")
    new = tmp_path / "new"
    new.mkdir()
    (new / "metrics.jsonl").write_text((old / "metrics.jsonl").read_text())

    def settings(*overrides):
        config = _config("prmim_interrupted", digits_dir, "seed=1", *overrides)
        (new / "config.json").write_text(config.to_json())
        return compare.hints(
            new / "metrics.jsonl", old / "metrics.jsonl", metric="train/loss"
        )

    assert settings() == []
    compare.check_alike([old / "metrics.jsonl", new / "metrics.jsonl"])
    assert settings("model.decoder.depth=2") == [
        "model.decoder.depth: 1 in the references, 2 in the run"
    ]


@pytest.mark.parametrize("name, title", [
    ("prmim_interrupted", "PR-MIM on CrossMAE W16-D2-H2/4, digits"),
    ("mae_finished", "MAE W16-D1-H2/4, digits"),
    ("classifier_finished", "Fine-tuning of W16-D1-H2/4, digits"),
])
def test_the_page_about_an_old_run_names_its_method(name, title, unpacked):
    page = run_page.write(unpacked(name)).read_text()
    assert f"<title>{title}: " in page and "encoder.<wbr>size" in page
