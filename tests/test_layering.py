"""Imports point one way, data code stays free of JAX, nothing hides in a drawer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "crossmae_jax").rglob("*.py"))

# From the bottom up: a file imports from rows above its own in this list, or its own.
ROWS = (
    ("errors",),
    ("ops", "patches", "paths", "losses", "augment", "masking", "distributed"),
    ("checkpoints", "data", "targets"),
    ("models", "runs", "optim"),
    ("objectives", "visualize", "train_step"),
    ("report", "convert", "cost"),
    ("evals",),
    ("train", "probing"),
    ("sweep",),
    ("main", "commands", "__main__"),
)


def _name(path):
    name = ".".join(path.relative_to(ROOT / "crossmae_jax").with_suffix("").parts)
    return name.removesuffix(".__init__")


def _row(name):
    for row, members in enumerate(ROWS):
        if any(name == m or name.startswith(f"{m}.") for m in members):
            return row
    return None


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _ours(path):
    """Returns the rows' names that a file imports."""
    found = set()
    for name in _imports(path):
        name = name.removeprefix("crossmae_jax.")
        if _row(name) is not None and not name.startswith(("jax", "flax", "ml_")):
            found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_one_way(path):
    name = _name(path)
    if name in ("__init__", "models", ""):
        return
    assert _row(name) is not None, f"{name} has no row: say where it belongs"
    upward = [other for other in _ours(path) if _row(other) > _row(name)]
    assert not upward, f"{name} imports {upward}, which lie above it"


def test_evaluators_know_neither_objectives_nor_models():
    for path in (ROOT / "crossmae_jax" / "evals").glob("*.py"):
        if path.stem == "of_checkpoint":  # which opens one
            continue
        assert not any(
            name.startswith(("objectives", "models", "train")) for name in _ours(path)
        ), path


@pytest.mark.parametrize("module", [
    "crossmae_jax", "crossmae_jax.data.sources", "crossmae_jax.data.transforms",
    "configs.vitb_cross", "crossmae_jax.main", "crossmae_jax.visualize",
    "crossmae_jax.distributed.hardware", "crossmae_jax.commands.estimate",
    "crossmae_jax.runs.metrics", "crossmae_jax.visualize.curves",
])
def test_these_do_not_import_jax(module):
    code = f"import sys, {module}; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


def test_no_module_is_a_drawer():
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("folder", ["crossmae_jax", "configs", "tests", "benchmarks"])
def test_no_line_is_longer_than_88(folder):
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > 88
    ]
    assert not long
