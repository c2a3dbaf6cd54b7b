"""The list of commands, and the files that set the project up."""

import ast
import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging import requirements

from crossmae_jax import __main__ as front_door

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_without_a_command_all_are_listed_with_their_summaries(arguments, capsys):
    assert front_door.main(arguments) == 0
    printed = capsys.readouterr().out
    for command, module in front_door.COMMANDS.items():
        summary = importlib.import_module(module).__doc__.splitlines()[0]
        assert re.search(rf"^  {command} +{re.escape(summary)}$", printed, re.MULTILINE)


def test_every_command_is_a_module_and_every_module_a_command():
    modules = {
        path.stem for path in (ROOT / "crossmae_jax" / "commands").glob("*.py")
    } - {"__init__", "flags", "session"}  # what the commands share
    assert {name.replace("-", "_") for name in front_door.COMMANDS} == modules
    for path in front_door.COMMANDS.values():
        assert callable(importlib.import_module(path).main)


def test_listing_the_commands_imports_no_jax():
    code = (
        "import sys\nfrom crossmae_jax.__main__ import main\nmain([])\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    )
    found = run("-c", code)
    assert found.returncode == 0, found.stderr


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert front_door.main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Unknown command 'trian'. Did you mean 'train'?")
    assert not captured.out


def test_a_command_gets_the_arguments_after_its_name_and_gives_the_status(monkeypatch):
    given = []

    def main(argv):
        given.extend(argv)
        return 7

    doctor = importlib.import_module(front_door.COMMANDS["doctor"])
    monkeypatch.setattr(doctor, "main", main)
    assert front_door.main(["doctor", "--x", "y"]) == 7
    assert given == ["--x", "y"]


def project_imports():
    """Returns the packages that our files import, by where."""
    found = {}
    for folder in ("crossmae_jax", "configs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module]
                else:
                    continue
                for name in names:
                    found.setdefault(name.partition(".")[0], set()).add(folder)
    return found


def declared():
    """Returns the distributions that setup.cfg names, by extra ("" for none)."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    groups = {"": parser["options"]["install_requires"]}
    groups |= parser["options.extras_require"]
    return {
        extra: {
            re.match(r"[\w-]+", line)[0] for line in lines.splitlines() if line.strip()
        }
        for extra, lines in groups.items()
    }


DISTRIBUTIONS = {
    "PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn", "faiss": "faiss-cpu", "skimage": "scikit-image",
    "imagecorruptions": "imagecorruptions-imaug", "yaml": "pyyaml",
}


def test_every_package_that_is_imported_is_declared():
    ours = {"crossmae_jax", "configs", "benchmarks", "tests"}
    # Named in the errors without them.
    optional = {
        "scikit-learn": "demo", "imagecorruptions-imaug": "robustness", "fsspec": "gcs",
        "scikit-image": "notebooks",
    }
    tested = set.union(*(
        declared()[extra] for extra in ("", "test", "interop", "notebooks")
    ))
    for name, folders in project_imports().items():
        if name in sys.stdlib_module_names or name in ours:
            continue
        name = DISTRIBUTIONS.get(name, name.replace("_", "-"))
        if folders == {"tests"}:
            assert name in tested, name
        elif name in declared()["interop"]:
            pass  # imported inside functions: see below
        elif folders == {"benchmarks"} and name in declared()["benchmarks"]:
            pass  # likewise
        elif name in optional:
            assert name in declared()[optional[name]], name
        else:
            assert name in declared()[""], f"{name}, imported in {folders}"


def test_every_declared_package_is_used():
    used = {
        DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in project_imports()
    }
    # TFDS imports both, but declares the first for Linux only and the second for old
    # Pythons only.
    assert declared()[""] - used <= {"array-record", "importlib-resources"}


def test_neither_tensorflow_nor_torch_is_needed():
    others = {"tensorflow", "torch", "tensorflow-cpu", "torchvision"}
    for extra, names in declared().items():
        assert extra == "interop" or not names & others
    assert "tensorflow" not in project_imports()


def test_the_other_side_of_conversions_is_imported_by_its_check_only():
    other_side = declared()["interop"]
    for path in (ROOT / "crossmae_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            if other_side & {name.partition(".")[0] for name in names}:
                assert path.parent.name == "convert", path
                assert node not in tree.body, f"{path} imports {names} at its top"


def test_what_only_benchmarks_need_is_imported_inside_functions():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = {each.name for each in node.names}
            else:
                names = {getattr(node, "module", None)}
            names = {DISTRIBUTIONS.get(name, name) for name in names}
            assert not names & declared()["benchmarks"], path


def test_every_pin_is_exact_and_inside_the_declared_bounds():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    pins = [
        requirements.Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    versions = {}
    for pin in pins:
        name = pin.name.lower().replace("_", "-")
        versions.setdefault(name, []).append(str(pin.specifier)[2:])
    lines = parser["options"]["install_requires"].splitlines()
    for extra in ("demo", "test", "robustness", "benchmarks", "gcs"):
        lines += parser["options.extras_require"][extra].splitlines()
    for line in filter(None, lines):
        requirement = requirements.Requirement(line)
        assert versions[requirement.name]
        for version in versions[requirement.name]:
            assert requirement.specifier.contains(version), (line, version)


def test_the_setup_names_no_registry():
    names = ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", ".ci/run")
    for name in names:
        text = (ROOT / name).read_text()
        assert "index-url" not in text and "://" not in text, name


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    found = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode != 0
    assert "needs Python 3.11 or newer" in found.stderr
    assert "Python 3.9.1" in found.stderr and "PYTHON=python3.12" in found.stderr
    assert not (tmp_path / ".venv").exists()
