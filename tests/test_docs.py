"""The Python in README and docs runs as it stands, on a run that was just trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import step
from crossmae_jax import train
from tests import saved_runs
from tests.test_benchmarks import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A folder in which runs/mine is a PR-MIM of the digits, trained for two steps."""
    directory = tmp_path_factory.mktemp("reader")
    config = step.load_config("configs/digits_cross_prmim.py", overrides=[
        *TINY, "epochs=0.2", "optim.warmup_epochs=0.0", "baselines=False",
        "evals.reconstruction.num_images=2",
    ])
    del config.unlock().evals["linear"], config.evals["knn"]
    train.run(config, directory / "runs" / "mine")
    (directory / "runs" / "digits_cross").symlink_to("mine")
    saved_runs.save_run(directory / "runs" / "folder_cross", "digits_cross")
    return directory


def _snippets(path):
    text = path.read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if _snippets(path)
]


IMAGES = """import numpy as np
images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
"""
CHECKS = {
    "checkpoints.md": "assert features.shape == (3, 16), features.shape",
    "README.md": "assert features.shape == (3, 16), features.shape",
    "weights.md": "assert tokens.shape == (3, 17, 16), tokens.shape",
    "probing.md": "assert len(after) == 2 and some.shape[1] == 3",
    "frameworks.md": "assert Path('gradients.png').stat().st_size > 1000",
    "pr_mim.md": "assert Path('sampling.png').stat().st_size > 1000",
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs(path, directory):
    """In a process of its own: here, tests check the types that readers may bend."""
    parts = [IMAGES, *_snippets(path), "from pathlib import Path", CHECKS[path.name]]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(parts)], cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr


def test_pages_with_python_are_found():
    assert {path.name for path in PAGES} == CHECKS.keys()


def test_every_fault_in_the_page_of_faults_has_the_test_that_it_names():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| (?!fault|---)", line)]
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows]
    assert len(rows) > 20 and all(named), rows
    written = {
        name for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert {name[1] for name in named} <= written
