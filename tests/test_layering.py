"""Imports point one way, data code stays free of JAX, nothing hides in a drawer."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crossmae_jax.models import aggregator, decoders, encoders, fusion

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "crossmae_jax").rglob("*.py"))

# From the bottom up: a file imports from rows above its own in this list, or its own.
ROWS = (
    ("errors", "glyphs", "kinds", "origins", "ranges", "tables"),
    ("ops", "tokens", "paths", "losses", "augment", "masking", "sampling",
     "distributed"),
    ("checkpoints", "data"),
    ("models", "targets", "runs", "optim"),
    ("objectives", "visualize", "train_step"),
    ("report", "convert", "cost"),
    ("evals",),
    ("job", "train", "probing"),
    ("sweep", "verify_resume"),
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


# A kind is compared where models are made, and where settings of old runs are read,
# whose kinds are those of then.
KNOW_KINDS = ("models", "runs.settings")
TABLES = (
    encoders.ENCODERS, fusion.FUSIONS, decoders.DECODERS, aggregator.AGGREGATORS
)
KINDS = {kind for table in TABLES for kind in table}
CLASSES = {part.__name__ for table in TABLES for part in table.values() if part}


def _strings(node):
    """Returns the strings that an operand of a comparison is, or is a display of."""
    parts = getattr(node, "elts", [node])
    return {part.value for part in parts if isinstance(part, ast.Constant)}


def _last_name(node):
    return getattr(node, "attr", getattr(node, "id", None))


def _names(node):
    return {_last_name(part) for part in ast.walk(node)}


def _compared_kinds(source):
    """Yields the lines on which code asks what kind a part of a model is."""
    for node in ast.walk(ast.parse(source)):
        wrong = False
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            strings = set().union(*map(_strings, operands)) & KINDS
            # Formats of weights have such names, too.
            if "format" not in map(_last_name, operands):
                wrong = bool(strings - {"none"})
            words = " ".join(ast.unparse(operand) for operand in operands)
            of_a_part = r"\b(encoder|fusion|decoder|aggregator)\W+(get\W+)?kind\b"
            wrong |= re.search(of_a_part, words) is not None
            wrong |= "none" in strings and "kind" in words
            wrong |= any(_last_name(operand) in CLASSES for operand in operands)
        elif isinstance(node, ast.Match):
            wrong = any(
                isinstance(part, ast.Constant) and part.value in KINDS
                for case in node.cases for part in ast.walk(case.pattern)
            )
        elif isinstance(node, ast.Call):
            asks = _last_name(node.func) in ("isinstance", "issubclass")
            wrong = asks and bool(_names(node.args[1]) & CLASSES)
        elif isinstance(node, ast.Dict):
            keys = {getattr(key, "value", None) for key in node.keys}
            wrong = len(keys) > 1 and any(keys <= set(table) for table in TABLES)
        if wrong:
            yield node.lineno


@pytest.mark.parametrize("folder", ["crossmae_jax", "benchmarks"])
def test_no_file_outside_models_compares_a_kind_of_model(folder):
    compared = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not (folder == "crossmae_jax" and _name(path).startswith(KNOW_KINDS))
        for line in _compared_kinds(path.read_text())
    ]
    assert not compared, "ask the part of the model instead: see models/decoders.py"


@pytest.mark.parametrize("source", [
    'config.model.decoder.kind == "mae"', 'card.model["decoder"]["kind"] != other',
    'kind in ("conv", "convnext")', 'model.fusion.kind == LAST', '"inter_block" == x',
    'options.kind != "none"', 'model["aggregator"].get("kind") == x',
    'isinstance(model.decoder, decoder_mae.MAEDecoder)', "type(x) is Last",
    '{"cross": "CrossMAE", "mae": "MAE"}[kind]',
    'match kind:\n    case "cross" | "mae": pass',
])
def test_a_comparison_of_kinds_is_found(source):
    assert list(_compared_kinds(source))


@pytest.mark.parametrize("source", [
    'format == "mae"', 'format in ("mae", "timm")', 'card.kind == "encoder"',
    'model.get("pool") == "cls"', 'optim.lr_scale == "none"',
    'dict(kind="mae", dim=8)', "model.decoder.gives_visible",
    'isinstance(module, layers.Block)', '{"mae": 1, "timm": 2}[format]',
])
def test_other_comparisons_are_none_of_kinds(source):
    assert not list(_compared_kinds(source))


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


def test_no_function_is_longer_than_60_lines():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[ast.get_docstring(node) is not None :]
                if body and node.end_lineno - body[0].lineno >= 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
