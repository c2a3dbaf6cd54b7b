"""The runs of docs/reading_the_curve.md: what the page says is what is run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import curves, step
from crossmae_jax.runs import metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reading_the_curve.md").read_text()


@pytest.mark.parametrize("name", curves.RUNS)
def test_the_page_gives_the_command_of_every_run(name):
    for flag in curves.RUNS[name]:
        assert flag in PAGE or name in curves.SEEDS[1:]
    assert all(flag in PAGE for flag in curves.OFTEN)


@pytest.mark.parametrize("name", curves.RUNS)
def test_every_run_changes_settings_that_there_are(name):
    overrides = []
    for flag in (*curves.OFTEN, *curves.RUNS[name]):
        flag = flag.removeprefix("--")
        negated = flag.startswith("no")
        flag = flag.removeprefix("no").removeprefix("config.")
        overrides.append(f"{flag}=False" if negated else flag)
    changed = json.loads(step.load_config(curves.CONFIG, overrides=overrides).to_json())
    assert changed["evals"]["rank"]["every_epochs"] == 4.0
    assert not changed["baselines"]


def test_every_picture_of_the_page_is_there_and_drawn_by_the_script():
    pictures = re.findall(r"\(images/(curve_\w+)\.png\)", PAGE)
    drawn = {"curve_healthy"}
    drawn |= {f"curve_{name}" for name in curves.SICK}
    drawn |= {f"curve_band_{name}" for name in ("another_seed", *curves.SICK)}
    assert set(pictures) == drawn
    for name in pictures:
        assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size > 5000


def test_references_are_thinned_to_losses_and_evaluations(tmp_path):
    rows = [
        {"step": 10, "train/loss": 0.123456789, "train/lr": 1e-3,
         "train/loss_trivial": 0.5},
        {"step": 10, "eval/knn/top1": 0.25},
    ]
    path = tmp_path / "thin.jsonl"
    path.write_text(curves.thinned("".join(json.dumps(row) + "\n" for row in rows)))
    assert metrics.curves(path) == {
        "train/loss": {10: 0.123457}, "train/loss_trivial": {10: 0.5},
        "eval/knn/top1": {10: 0.25},
    }


def test_figures_are_drawn_from_runs(tmp_path):
    random = np.random.default_rng(0)
    for name in (*curves.SEEDS, "another_seed", *curves.SICK, "untrained"):
        steps = [1] if name == "untrained" else range(10, 210, 10)
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(
            json.dumps({"step": at, "train/loss_trivial": 0.6} | {
                metric: random.uniform(0.4, 0.5) for metric in curves.JUDGED
            }) + "\n" for at in steps
        ))
    curves.draw(tmp_path, tmp_path / "images")
    assert len(list((tmp_path / "images").glob("curve_*.png"))) == 8
