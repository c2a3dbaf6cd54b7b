"""The notebooks run from top to bottom, and their outputs are those of these cells."""

import os
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _kinds(cell):
    """Returns what kinds of outputs a cell has; text may come in several pieces."""
    found = []
    for output in cell.outputs:
        kind = sorted(output.data) if "data" in output else output.output_type
        if not found or found[-1] != kind:
            found.append(kind)
    return found


def _code(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("out"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # One device, as a reader has; compiled as the tests are.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    made = nbformat.read(folder / path.name, 4)
    nbclient.NotebookClient(
        made, timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    committed = _code(path)
    assert [_kinds(cell) for cell in cells] == [_kinds(cell) for cell in committed]
    assert any("image/png" in kind for cell in cells for kind in _kinds(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_one_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in _code(path)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for cell in _code(path) for output in cell.outputs}
    assert kinds <= {"display_data", "execute_result", "stream"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_the_notebook_needs(path):
    first = _code(path)[0].source
    assert '%pip install --quiet "./crossmae_jax[notebooks]"' in first
    assert "\nnotebooks =\n" in (ROOT / "setup.cfg").read_text()


def test_there_are_four():
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == [
        "01", "02", "03", "04"
    ]
