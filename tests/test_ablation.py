"""The ablation and its follow-ups: real short runs, read back, tabulated."""

import itertools
import json
import re

import pytest

from benchmarks import ablation, dots, gradients, held_out, sampling, step
from crossmae_jax import objectives, train
from tests.test_benchmarks import TINY

SHORT = [*TINY, "model.dtype=float32", "epochs=0.3", "optim.warmup_epochs=0.1"]
CONFIG = "configs/digits_mae.py"
KINDS = ("none", "conv")


def cells(text, first):
    """Returns the cells of the table's rows whose first cell matches."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if re.fullmatch(first, row[0])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two cells, trained for three steps with two seeds, and how they were called."""
    directory = tmp_path_factory.mktemp("ablation")
    arguments = ["aggregators", f"--config={CONFIG}", f"--workdir={directory}"]
    arguments += ["--seeds", "3", "5"] + [f"--override={change}" for change in SHORT]
    grid, load = ablation.GRIDS["aggregators"], step.load_config

    def load_config(path, *, overrides):
        """With the evaluations that compile little."""
        config = load(path, overrides=overrides)
        config.evals = {
            kind: config.evals[kind] for kind in ("knn", "reconstruction")
            if kind in config.evals
        }
        return config

    with pytest.MonkeyPatch.context() as patch:
        few = {kind: grid[kind] for kind in KINDS}
        patch.setitem(ablation.GRIDS, "aggregators", few)
        patch.setattr(step, "load_config", load_config)
        ablation.main(arguments)
        yield directory, arguments


def test_every_cell_is_trained_with_every_seed_and_evaluated(runs):
    directory, _ = runs
    for kind in KINDS:
        for seed in (3, 5):
            run = directory / kind / f"seed_{seed}"
            config = json.loads((run / "config.json").read_text())
            assert config["model"]["aggregator"]["kind"] == kind
            assert config["masking"]["throw_ratio"] == 0.5
            assert config["seed"] == seed and not config["baselines"]
            found = json.loads((run / "found.json").read_text())
            assert found["train/loss"] > 0 and 0 <= found["eval/knn/top1"] <= 1
            assert ("eval/reconstruction/mse_thrown" in found) == (kind != "none")


def test_a_finished_cell_is_read_and_not_trained_again(runs, monkeypatch, capsys):
    directory, arguments = runs
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("trained again"))
    for seed, share in ((3, 0.5), (5, 0.7)):
        path = directory / "conv" / f"seed_{seed}" / "found.json"
        found = json.loads(path.read_text()) | {"eval/knn/top1": share}
        path.write_text(json.dumps(found))
    ablation.main(arguments)
    printed = capsys.readouterr().out
    assert f"aggregators of {CONFIG}" in printed
    assert "optim.warmup_epochs=0.1" in printed
    (conv,) = cells(printed, "conv")
    assert conv[1] == "60.0 ± 14.1" and conv[-1] == "2"
    (plain,) = cells(printed, "none")
    assert plain[-2] == "-", "nothing predicts what plain throwing throws"


def test_cells_are_drawn_with_a_dot_for_each_seed(runs, tmp_path, capsys):
    directory, _ = runs
    picture = tmp_path / "dots.png"
    dots.main([str(picture), f"MAE={directory}", "--grid=aggregators"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = dots.read(directory, "aggregators")
    assert list(found) == list(KINDS) and {len(cell) for cell in found.values()} == {2}
    with pytest.raises(SystemExit):
        dots.main([str(picture), str(tmp_path), "--grid=aggregators"])
    assert "has no finished run of aggregators" in capsys.readouterr().err


def test_table_2_crosses_ratio_method_and_choice():
    grid = ablation.GRIDS["table2"]
    assert len(grid) == 1 + 3 * 2 * 2
    found = set()
    for name, overrides in grid.items():  # whatever the config throws by itself
        config = step.load_config("configs/vitb_mae_prmim.py", overrides=overrides)
        objectives.make(config)
        masking, kind = config.masking, config.model.aggregator.kind
        found.add((masking.throw_ratio, kind, masking.retain))
        assert ("progressive" in name) == (kind == "conv")
        assert ("furthest" in name) == (masking.retain == "furthest")
    assert found == {(0.0, "none", "random")} | set(itertools.product(
        (0.25, 0.5, 0.65), ("none", "conv"), ("random", "furthest")
    ))


@pytest.mark.parametrize("path", [
    CONFIG, "configs/digits_simmim.py", "configs/digits_local.py",
    "configs/photographs_simmim.py", "configs/photographs_local.py",
])
def test_frameworks_are_compared_by_what_is_thrown_alone(path):
    found = {}
    for name, overrides in ablation.GRIDS["frameworks"].items():
        config = step.load_config(path, overrides=overrides)
        objective = objectives.make(config)
        found[name] = (
            config.masking.throw_ratio, bool(objective.model.aggregators),
            config.masking.retain,
        )
    assert found == {
        "nothing thrown": (0.0, False, "random"), "plain": (0.5, False, "random"),
        "PR-MIM": (0.5, True, "furthest"),
    }


def test_the_loss_of_held_out_images_counts_every_masked_patch(runs, capsys):
    directory, arguments = runs
    ablation.main([*arguments, "--held-out-loss"])
    printed = capsys.readouterr().out
    assert "loss as trained | loss, all decoded" in printed
    for kind in KINDS:
        run = directory / kind / "seed_3"
        found = held_out.losses(run)
        assert found == json.loads((run / "held_out.json").read_text())
        assert 0.3 < found[held_out.ALL_DECODED] < 2
        assert found[held_out.AS_TRAINED] != found[held_out.ALL_DECODED]
    # Of the same images under the same masks, as the panels' errors: MAE's loss is one.
    evaluated = json.loads((directory / "none" / "seed_3" / "found.json").read_text())
    assert held_out.losses(directory / "none" / "seed_3")[
        held_out.ALL_DECODED
    ] == pytest.approx(evaluated["eval/reconstruction/mse"], rel=0.1)


def test_a_finished_cell_of_other_settings_is_not_taken_for_this_one(runs):
    directory, _ = runs
    overrides = [*SHORT, *ablation.GRIDS["aggregators"]["conv"], "optim.b1=0.8"]
    with pytest.raises(ValueError, match="holds a run with other settings"):
        ablation.run(
            CONFIG, overrides, seed=3, directory=directory / "conv" / "seed_3"
        )


def test_gradients_are_compared_on_a_trained_run(runs, capsys):
    directory, _ = runs
    gradients.main([str(directory / "conv" / "seed_3"), "--images=256"])
    rows = cells(capsys.readouterr().out, "conv, 50% thrown")
    assert [row[1:3] for row in rows] == [
        ["0%", "another mask"], ["50%", "plain, random"], ["50%", "plain, furthest"],
        ["50%", "progressive, random"], ["50%", "progressive, furthest"],
    ]
    assert all(float(row[3].split()[0]) > 0 and row[-1] == "2" for row in rows)


def test_plain_throwing_is_compared_on_a_run_that_threw_nothing(tmp_path, capsys):
    overrides = [*SHORT, *ablation.GRIDS["table2"]["nothing thrown"]]
    ablation.run(CONFIG, overrides, seed=0, directory=tmp_path)
    capsys.readouterr()
    gradients.main([str(tmp_path), "--images=300"])  # 44 do not fill a batch
    rows = cells(capsys.readouterr().out, "nothing thrown")
    assert len(rows) == 1 + 3 * 2 and rows[-1][1:3] == ["65%", "plain, furthest"]
    assert all(row[-1] == "2" for row in rows)


def test_gradients_need_a_run_to_compare_on(runs):
    directory, _ = runs
    with pytest.raises(ValueError, match="aggregator 'none' and throw_ratio 0.5"):
        gradients.compare(directory / "none" / "seed_3", num_images=128)


def test_the_choice_of_tokens_is_timed_against_the_step(capsys):
    sampling.main([
        "--config=configs/digits_cross_prmim.py", "--batch=64", "--step-batch=16",
        "--steps=2", *(f"--override={change}" for change in TINY),
    ])
    printed = capsys.readouterr().out
    assert "64 images, 12 masked patches -> 4; steps of 16 images" in printed
    for choice in ("random", "furthest"):
        (row,) = cells(printed, choice)
        assert float(row[2].rstrip("%")) > 0
