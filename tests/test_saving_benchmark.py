"""The benchmark of saves times the run's own step and its own checkpoints."""

import re

from benchmarks import saving, step
from tests.test_benchmarks import TINY


def test_a_round_with_a_save_is_compared_with_one_without(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(saving, "RESULTS", tmp_path / "results" / "saving.md")
    arguments = [f"--override={override}" for override in TINY]
    saving.main([
        "--config=configs/digits_cross.py", "--batch=8", "--steps=2", "--rounds=2",
        f"--directory={tmp_path}", "--write", *arguments,
    ])
    printed = capsys.readouterr().out
    assert (tmp_path / "results" / "saving.md").read_text() == printed
    assert "2 rounds of 2 steps" in printed and "data.batch_size=8" in printed
    assert re.search(r"\| digits_cross \| .* \| [012]/2 \| ", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # cleared away


def test_the_table_has_the_difference_of_neighbouring_rounds():
    rounds = [
        saving.Round(alone=10.0, saving=13.0, call=1.0, written=5.0),
        saving.Round(alone=20.0, saving=21.0, call=2.0, written=30.0),
        saving.Round(alone=30.0, saving=32.0, call=3.0, written=31.0),
    ]
    run = step.Run("x", None, 0.0, 0, lambda: None, state=lambda: {})
    cells = saving.table(run, rounds, num_steps=10, interval=100.0).splitlines()[-1]
    assert [cell.strip() for cell in cells.split("|")[1:-1]] == [
        "x", "0.00", "2.000", "2.00", "30.0", "2/3", "2.00 (1.00..3.00)", "2.00%",
    ]
