"""The commands, the flags of training, and the files that set the project up."""

import ast
import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging import requirements

from crossmae_jax import __main__ as front_door

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/digits_cross.py"


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
    } - {"__init__"}
    assert set(front_door.COMMANDS) == modules
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


WRONG_FLAGS = {
    "--config is missing: the file that describes the experiment": [],
    "--workdir is missing: the directory of this run, such as "
    "--workdir=runs/digits_cross": [CONFIG],
    "No config file configs/digits_crss.py. Did you mean configs/digits_cross.py?":
        ["--config=configs/digits_crss.py", "--workdir=x"],
    "Unknown setting --config.optim.base_lrr. Did you mean base_lr?":
        [CONFIG, "--workdir=x", "--config.optim.base_lrr=1"],
    "Unknown setting --config.optm. Did you mean optim?":
        [CONFIG, "--workdir=x", "--config.optm.base_lr", "1"],
    "Unknown setting --config.evals.umap. "
    "There are: knn, linear, rank, reconstruction.":
        [CONFIG, "--workdir=x", "--config.evals.umap.k=1"],
    "Unknown setting --config.seed.x.": [CONFIG, "--workdir=x", "--config.seed.x=1"],
    "Unexpected arguments: seed=1.": [CONFIG, "--workdir=x", "seed=1"],
    "could not convert string to float: 'fast'":
        [CONFIG, "--workdir=x", "--config.optim.base_lr=fast"],
    "Unknown command line flag 'workdri'. Did you mean: workdir":
        [CONFIG, "--workdri=x"],
}


@pytest.mark.parametrize("message", WRONG_FLAGS)
def test_wrong_flags_end_with_what_to_do(message, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    found = run("-m", "crossmae_jax", "train", *WRONG_FLAGS[message], cwd=tmp_path)
    assert found.returncode != 0
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


# Takes the place of the train loop, which tests/test_train.py runs.
RECORDER = """
import json, runpy, sys, types
recorder = types.ModuleType("crossmae_jax.train")
recorder.run = lambda config, workdir: print(json.dumps([workdir, config.to_dict()]))
sys.modules["crossmae_jax.train"] = recorder
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("program", [["crossmae_jax.main"], ["crossmae_jax", "train"]])
def test_both_ways_to_train_hand_over_the_same_settings(program):
    found = run(
        "-c", RECORDER, *program, CONFIG, "--workdir", "runs/x",
        "--config.optim.base_lr=2", "--config.optim.clip_norm=3.5",
        "--config.epochs=0.5", "--config.data.image_size=(8, 16)",
        "--config.model.fusion.maps=(0, -1)", "--config.data.dir=/some/where",
        "--noconfig.data.flip", "--config.evals.knn.k=5",
        "--config.evals.knn.pools=('cls', 'mean')",
    )
    assert found.returncode == 0, found.stderr
    workdir, config = json.loads(found.stdout)
    assert workdir == "runs/x"
    assert config["optim"]["base_lr"] == 2.0 and config["optim"]["clip_norm"] == 3.5
    assert config["epochs"] == 0.5 and config["evals"]["knn"]["k"] == [5]
    assert config["evals"]["knn"]["pools"] == ["cls", "mean"]
    assert config["data"]["image_size"] == [8, 16]
    assert config["data"]["dir"] == "/some/where" and config["data"]["flip"] is False
    assert config["model"]["fusion"]["maps"] == [0, -1]


@pytest.mark.parametrize("program", [["crossmae_jax.main"], ["crossmae_jax", "train"]])
def test_settings_that_contradict_each_other_end_without_a_traceback(program, tmp_path):
    found = run(
        "-m", *program, CONFIG, f"--workdir={tmp_path}/run",
        "--config.data.batch_size=0",
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("error: batch_size=0 does not div")
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


# The train loop ends with each of the errors that the first argument names.
FAILING = """
import sys
from crossmae_jax import errors, main, train
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import environment
from crossmae_jax.data import bad_images, decoding
from crossmae_jax.ops import attention_check

names, sys.argv = sys.argv[1].split(), sys.argv[1:]
main.parse_flags(sys.argv)
for name in names:
    error = eval(name)("what was wrong")
    def fail(config, workdir):
        raise error
    train.run = fail
    try:
        main.main([])
    except BaseException as caught:
        print(name, "is a bug" if caught is error else repr(caught))
"""


def test_an_error_for_the_user_is_a_line_and_a_bug_keeps_its_traceback(tmp_path):
    for_users = [
        "errors.SetupError", "environment.AcceleratorError",
        "checkpointer.MismatchError",
        "bad_images.TooManyBadImages", "decoding.ChannelMismatch",
        "attention_check.KernelError",
    ]
    bugs = ["ValueError", "RuntimeError", "FloatingPointError"]
    found = run(
        "-c", FAILING, " ".join(for_users + bugs), CONFIG, f"--workdir={tmp_path}"
    )
    assert found.stdout.splitlines() == [
        *(f"{name} SystemExit('error: what was wrong')" for name in for_users),
        *(f"{name} is a bug" for name in bugs),
    ], found.stderr


def test_the_flags_can_be_imported_without_jax():
    # A loader worker imports the main module of the process that started it.
    code = "import sys, crossmae_jax.main\nassert 'jax' not in sys.modules"
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize("program", [["crossmae_jax.main"], ["crossmae_jax", "train"]])
def test_help_names_the_flags(program):
    found = run("-m", *program, "--help")
    assert "--config" in found.stdout and "--workdir" in found.stdout


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
