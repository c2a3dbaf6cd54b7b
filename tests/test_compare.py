"""A run over the band of its references: curves made by hand, and those shipped."""

import configparser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from configs import digits_cross
from crossmae_jax import __main__ as front_door
from crossmae_jax.runs import compare, metrics, workdir

ROOT = Path(__file__).parents[1]
STEPS = np.arange(10, 610, 10)
CURVE = 0.2 + np.exp(-STEPS / 100)


def write(directory, values, *, steps=STEPS, metric="train/loss", config=None):
    """Writes the metrics of a run, as a run does, and returns their path."""
    directory.mkdir(parents=True)
    lines = [
        json.dumps({"step": int(step), metric: None if np.isnan(value) else value})
        for step, value in zip(steps, values, strict=True)
    ]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if config is not None:
        (directory / "config.json").write_text(config.to_json())
    return directory / "metrics.jsonl"


@pytest.fixture
def references(tmp_path):
    """Three runs with independent noise of 1 percent at every logged step."""
    random = np.random.default_rng(0)
    return [
        write(tmp_path / f"seed_{seed}", CURVE * random.normal(1, 0.01, len(STEPS)))
        for seed in range(3)
    ]


def _config(**changes):
    config = digits_cross.get_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def test_another_seed_stays_in_the_band(references, tmp_path):
    noise = np.random.default_rng(7).normal(1, 0.01, len(STEPS))
    found = compare.compare(write(tmp_path / "run", CURVE * noise), references)
    assert found.stretches == () and not found.outside_to_the_end
    assert list(found.steps) == list(STEPS)
    assert "never leaves the band" in compare.describe(found)


@pytest.mark.parametrize("factor, side", [(1.3, "above"), (0.7, "below")])
def test_the_step_at_which_a_run_leaves_for_good_is_found_exactly(
    references, tmp_path, factor, side
):
    values = np.where(STEPS >= 250, factor * CURVE, CURVE)
    found = compare.compare(write(tmp_path / "run", values), references)
    assert found.stretches == (compare.Stretch(250, 600, side),)
    assert found.outside_to_the_end
    assert f"{side} the band from step 250 for good" in compare.describe(found)


def test_a_run_that_comes_back_is_told_with_both_steps(references, tmp_path):
    values = np.where((STEPS >= 200) & (STEPS <= 300), 1.5 * CURVE, CURVE)
    found = compare.compare(write(tmp_path / "run", values), references)
    assert found.stretches == (compare.Stretch(200, 300, "above"),)
    assert not found.outside_to_the_end
    assert "from step 200 to step 300" in compare.describe(found)


def test_single_noisy_batches_do_not_leave_the_band(references, tmp_path):
    values = CURVE.copy()
    values[[5, 6, 20, 41]] *= 4
    found = compare.compare(write(tmp_path / "run", values), references)
    assert found.stretches == ()
    assert found.logged[20] == pytest.approx(4 * CURVE[20])


def test_a_single_batch_back_inside_does_not_end_a_stretch(references, tmp_path):
    values = np.where(STEPS >= 250, 1.3 * CURVE, CURVE)
    values[[35, 45]] = CURVE[[35, 45]]
    found = compare.compare(write(tmp_path / "run", values), references)
    assert found.stretches == (compare.Stretch(250, 600, "above"),)


def test_evaluations_are_not_smoothed_and_need_three_in_a_row(references, tmp_path):
    theirs = [
        write(tmp_path / f"eval_{seed}", np.full(60, 0.9 + 0.001 * seed),
              metric="eval/knn/top1")
        for seed in range(3)
    ]
    for length, expected in ((2, 0), (3, 1)):
        values = np.full(60, 0.9)
        values[30 : 30 + length] = 0.5
        run = write(tmp_path / f"run_{length}", values, metric="eval/knn/top1")
        found = compare.compare(run, theirs, metric="eval/knn/top1")
        assert len(found.stretches) == expected
        np.testing.assert_array_equal(found.smoothed, values)


def test_the_band_is_what_the_docstring_says():
    values = np.array([[1.0, 1.0], [1.2, 1.0], [1.4, 1.0]])
    band = compare.band_of(values, pooled=1)
    np.testing.assert_allclose(band.mean, [1.2, 1.0])
    np.testing.assert_allclose(band.low, [1.0 - 2 * 0.2, 1.0 - 0.02])
    np.testing.assert_allclose(band.high, [1.4 + 2 * 0.2, 1.0 + 0.02])
    pooled = compare.band_of(values, pooled=3)
    np.testing.assert_allclose(pooled.high, np.array([1.4, 1.0]) + 0.4 / np.sqrt(2))
    single = compare.band_of(values[:1], pooled=3)
    np.testing.assert_allclose(single.high, 1.02)


def test_a_loss_that_is_not_finite_is_outside(references, tmp_path):
    values = np.where(STEPS >= 400, np.nan, CURVE)
    found = compare.compare(write(tmp_path / "run", values), references)
    assert found.stretches == (compare.Stretch(400, 600, "not finite"),)
    assert "not finite from step 400 for good" in compare.describe(found)


def test_one_value_that_is_not_finite_is_no_departure(references, tmp_path):
    values = np.where(STEPS == 210, np.nan, CURVE)
    assert not compare.compare(write(tmp_path / "run", values), references).stretches


def test_a_run_that_changes_sides_is_told_with_both(references, tmp_path):
    values = np.where(STEPS < 300, 1.5, 0.5) * CURVE
    found = compare.compare(write(tmp_path / "run", values), references)
    assert [stretch.side for stretch in found.stretches] == ["above", "below"]
    assert (found.stretches[0].first, found.stretches[1].last) == (10, 600)
    text = compare.describe(found)
    assert "above the band from step 10 to" in text
    assert "below the band from step" in text and "for good" in text


def test_only_common_steps_are_compared(references, tmp_path):
    run = write(tmp_path / "run", CURVE[4:30:5], steps=STEPS[4:30:5])
    found = compare.compare(run, references)
    assert list(found.steps) == [50, 100, 150, 200, 250, 300]
    assert "the run ends at step 300, the references at 600" in compare.describe(found)


def test_a_metric_that_is_not_there_is_answered_with_those_that_are(
    references, tmp_path
):
    run = write(tmp_path / "run", CURVE)
    with pytest.raises(ValueError, match="no 'train/los'. It has: train/loss"):
        compare.compare(run, references, metric="train/los")


def test_what_cannot_be_compared_is_refused(references, tmp_path):
    run = write(tmp_path / "run", CURVE, steps=STEPS + 3)
    with pytest.raises(ValueError, match="no step in common: steps 13, 23, ... 603 ag"):
        compare.compare(run, references)
    with pytest.raises(ValueError, match="one of its own references"):
        compare.compare(references[0], references)
    with pytest.raises(ValueError, match="is given twice"):
        compare.compare(run, [references[0], references[0]])
    sick = write(tmp_path / "sick", np.full(60, np.nan))
    with pytest.raises(ValueError, match="of a reference is not finite"):
        compare.compare(write(tmp_path / "other", CURVE), [*references, sick])
    (tmp_path / "text.jsonl").write_text("no metrics\n{}\n")
    with pytest.raises(ValueError, match="text.jsonl, line 1 is not an object with a"):
        metrics.curves(tmp_path / "text.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no metrics.jsonl; give the --workdir"):
        compare.find(tmp_path / "empty")
    with pytest.raises(ValueError, match="No run 'digit'. .* library: digits_cross"):
        compare.find("digit")


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path):
    path = write(tmp_path / "run", CURVE)
    with open(path, "a") as file:
        file.write('{"step": 610, "train/lo')
    assert list(metrics.curves(path)["train/loss"]) == list(STEPS)


def test_references_of_different_settings_are_refused_by_name(tmp_path):
    paths = [
        write(tmp_path / "a", CURVE, config=_config(seed=0)),
        write(tmp_path / "b", CURVE, config=_config(seed=1, log_every_steps=5)),
    ]
    run = write(tmp_path / "run", CURVE)
    assert compare.compare(run, paths).stretches == ()
    paths.append(write(tmp_path / "c", CURVE, config=_config(optim__base_lr=0.5)))
    with pytest.raises(ValueError, match="optim.base_lr: 0.012 and 0.5"):
        compare.compare(run, paths)


def test_settings_that_differ_are_the_first_hint(tmp_path):
    path = write(tmp_path / "a", CURVE, config=_config())
    run = write(tmp_path / "run", CURVE, config=_config(
        seed=3, masking__mask_ratio=0.1, evals__knn__k=(5,),
        evals__knn__every_epochs=2.0,
    ))
    hints = compare.hints(run, path, metric="train/loss")
    assert hints == ["masking.mask_ratio: 0.75 in the references, 0.1 in the run"]
    evaluated = compare.hints(run, path, metric="eval/knn/top1")
    assert len(evaluated) == 2 and evaluated[1].startswith("evals.knn: {'k': [20]")
    assert compare.hints(
        write(tmp_path / "bare", CURVE), path, metric="train/loss"
    ) is None


SEEDS = compare.find("digits_cross")


def test_the_shipped_references_are_three_whole_runs():
    assert [path.name for path in SEEDS] == [f"seed_{seed}.jsonl" for seed in range(3)]
    for path in SEEDS:
        curves = metrics.curves(path)
        assert {"train/loss", "train/loss_trivial", "eval/knn/top1"} <= set(curves)
        assert {*range(10, 590, 10), 585} <= set(curves["train/loss"])
        assert len(curves["eval/rank/effective"]) >= 10
        assert curves["train/loss"][585] < 0.5 * curves["train/loss_trivial"][585]
    assert len({path.read_text() for path in SEEDS}) == 3


def test_the_shipped_references_are_of_the_configuration_in_the_repository():
    shipped = json.loads(workdir.read_config(SEEDS[0].parent).to_json())
    ours = json.loads(digits_cross.get_config().to_json())
    assert workdir.differing(shipped, ours) == {}
    environment = json.loads((SEEDS[0].parent / "environment.json").read_text())
    assert {"versions", "devices"} <= set(environment)
    assert "configs/digits_cross.py" in (SEEDS[0].parent / "README.md").read_text()


@pytest.mark.parametrize("metric", ["train/loss", "eval/knn/top1"])
def test_each_shipped_seed_stays_in_the_band_of_all(metric, tmp_path):
    for path in SEEDS:
        run = shutil.copy(path, tmp_path / path.name)
        found = compare.compare(run, SEEDS, metric=metric)
        assert found.stretches == (), compare.describe(found)
    flat = {step: 0.63 for step in metrics.curves(SEEDS[0])["train/loss"]}
    run = write(tmp_path / "flat", list(flat.values()), steps=list(flat))
    assert compare.compare(run, SEEDS).outside_to_the_end


def test_an_installed_library_has_the_references(tmp_path):
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    patterns = parser["options.package_data"]["crossmae_jax"].split()
    package = ROOT / "crossmae_jax"
    declared = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in compare.SHIPPED.rglob("*") if path.is_file()}
    assert files and files <= declared


def test_the_command_draws_tells_and_ends_with_the_status(tmp_path, capsys):
    sick = {
        step: {"step": step, "train/loss": value * (1.0 if step < 300 else 3.0)}
        for step, value in metrics.curves(SEEDS[0])["train/loss"].items()
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in sick.values())
    )
    config = _config(optim__weight_decay=0.5)
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    picture = tmp_path / "pictures" / "compare.png"
    run = ["compare", str(tmp_path / "run"), "digits_cross", f"--to={picture}"]
    assert front_door.main(run) == 1
    printed = capsys.readouterr().out
    assert "above the band from step 300 for good" in printed
    assert "optim.weight_decay: 0.05 in the references, 0.5 in the run" in printed
    assert matplotlib.image.imread(picture).std() > 0.05

    healthy = shutil.copy(SEEDS[1], tmp_path / "healthy.jsonl")
    run = ["compare", str(healthy), *map(str, SEEDS[::2]), f"--to={picture}"]
    assert front_door.main(run) == 0
    assert "settings  not known" in capsys.readouterr().out
    assert front_door.main([*run, "--metric=eval/knn"]) == 2
    assert "no 'eval/knn'. It has: eval/knn/cls/k20/top1, ev" in capsys.readouterr().err
    assert front_door.main(["compare", "digits_cross", str(healthy)]) == 2
    assert "are 3 runs; compare one" in capsys.readouterr().err


def test_help_says_what_the_status_means():
    run = subprocess.run(
        [sys.executable, "-m", "crossmae_jax", "compare", "--help"], cwd=ROOT,
        capture_output=True, text=True,
    )
    assert run.returncode == 0 and "Exit status 0 if the run stays" in run.stdout
