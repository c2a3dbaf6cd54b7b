"""What all commands share: how flags are written, and how errors end them."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import digits_cross
from crossmae_jax import __main__ as front_door
from crossmae_jax import errors
from crossmae_jax.commands import flags

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/digits_cross.py"


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


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
    "Unknown setting --config.model.decoder_dim. model.decoder_dim is now "
    "model.decoder.dim.":
        [CONFIG, "--workdir=x", "--config.model.decoder_dim=8"],
    "--config.model.decoder is a group of settings. model.decoder is now "
    "model.decoder.kind.": [CONFIG, "--workdir=x", "--config.model.decoder=mae"],
    "Unknown setting --config.seed.x.": [CONFIG, "--workdir=x", "--config.seed.x=1"],
    "Unexpected arguments: seed=1.": [CONFIG, "--workdir=x", "seed=1"],
    "could not convert string to float: 'fast'":
        [CONFIG, "--workdir=x", "--config.optim.base_lr=fast"],
    "Unknown flag --workdri. Did you mean --workdir?":
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
recorder.run = lambda config, workdir, resume: print(
    json.dumps([workdir, config.to_dict(), resume])
)
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
        "--config.evals.knn.pools=('cls', 'mean')", "--resume=never",
    )
    assert found.returncode == 0, found.stderr
    workdir, config, resume = json.loads(found.stdout)
    assert (workdir, resume) == ("runs/x", "never")
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
from crossmae_jax import errors, train
from crossmae_jax.commands import train as command
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.distributed import environment
from crossmae_jax.data import bad_images, decoding
from crossmae_jax.ops import attention_check
from crossmae_jax.runs import journal

_, names, *arguments = sys.argv
names = names.split()
for name in names:
    error = eval(name)("what was wrong")
    def fail(config, workdir, resume):
        raise error
    train.run = fail
    try:
        command.main(arguments)
    except BaseException as caught:
        print(name, "is a bug" if caught is error else repr(caught))
"""


def test_an_error_for_the_user_is_a_line_and_a_bug_keeps_its_traceback(tmp_path):
    for_users = [
        "errors.SetupError", "environment.AcceleratorError",
        "checkpointer.MismatchError",
        "bad_images.TooManyBadImages", "decoding.ChannelMismatch",
        "attention_check.KernelError", "journal.NotFinite",
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
    assert found.returncode == 0
    assert "--config" in found.stdout and "--workdir" in found.stdout


# The words that come before the flags of each command.
PARSED = {name: [name] for name in front_door.COMMANDS} | {
    "checkpoints": ["checkpoints", "ls"],
    "convert": ["convert", "export"], "data": ["data", "prepare", "digits"],
    "evaluate": ["evaluate", "--checkpoint=x", CONFIG],
} | {name: [name, CONFIG] for name in (
    "train", "sweep", "cost", "estimate", "verify-resume"
)}


@pytest.fixture
def call(monkeypatch, capsys):
    """Returns a function that calls a command: exit status, output, errors."""
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        try:
            status = front_door.main(list(map(str, arguments)))
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("command", front_door.COMMANDS)
def test_all_commands_speak_one_dialect(command, call):
    before = PARSED[command]
    status, printed, said = call(*before, "--no_such_flag=1")
    assert (status, printed) == (2, "")
    first, second = said.splitlines()
    assert first.startswith("Unknown flag --no_such_flag.")
    name = " ".join(word for word in before if not word.startswith("-"))
    assert second == (
        f"Write python -m crossmae_jax {name} --help to see how it is called."
    )
    for asked in ("--help", "-h"):
        status, printed, said = call(*before, asked)
        module = importlib.import_module(front_door.COMMANDS[command])
        assert (status, said) == (0, "")
        assert printed.startswith(module.__doc__.rstrip()) and "Flags:" in printed


@pytest.mark.parametrize("arguments, message", [
    (["compare", "a", "b", "--metrci=x"], "--metrci. Did you mean --metric?"),
    (["convert", "import", "x", "--too=y"], "--too. Did you mean --to?"),
    (["convert", "imprt"], "convert has no 'imprt'. Did you mean import?"),
    (["convert"], "Nothing to do: write convert and one of inspect, import, export."),
    (["data", "prepare", "digit"], "no 'digit'. Did you mean digits?"),
    (["convert", "import"], "FILE is missing."),
    (["convert", "import", "x"], "--to is missing: what to write"),
    (["compare", "a"], "REFERENCE... is missing."),
    (["checkpoints", "list"], "checkpoints has no 'list'"),
    (["checkpoints", "prune", "x"], "--keep is missing: how many of the newest whole"),
    (["report", "a", "b"], "Unexpected arguments: b. What is set takes two dashes"),
    (["convert", "export", "x", "--format=tim"], "there is no 'tim'. Did you mean tim"),
    (["convert", "export", "x", "--parts=decoder"], "--parts=decoder: there is no "),
    (["attention", "--num_images=many"], "--num_images=many: invalid literal for int"),
    (["attention", "--normalize=perhaps"], "--normalize=perhaps: "),
    (["reconstruct", "--to"], "Missing value for flag --to"),
    (["sweep", CONFIG, "--workdir=", "--blocks=0"], "--workdir is missing: the dir"),
    (["sweep", CONFIG, "--workdir=x", "--blocks="], "--blocks is missing: numbers of"),
])
def test_wrong_flags_of_any_command_end_with_what_to_do(call, arguments, message):
    status, printed, line = call(*arguments)
    assert (status, printed) == (2, "")
    assert message in line and len(line.splitlines()) <= 2


def test_a_file_of_old_names_is_understood_with_a_note(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    model = dict(decoder='mae', decoder_dim=8)\n"
        "    return ConfigDict(dict(model=model))\n"
    )
    model = flags.load_config(path).model
    assert model.decoder.to_dict() == {"kind": "mae", "dim": 8}
    note = capsys.readouterr().err
    assert note.startswith(f"{path} has old names, which were understood: ")
    assert "model.decoder_dim is now model.decoder.dim" in note


def test_flags_may_stand_before_and_after_operands_with_and_without_equals():
    table = {
        "to": flags.Flag(str, "a place"), "fast": flags.Flag(bool, "", default=False),
        "sizes": flags.Flag(flags.numbers(int), "", default=(1,)),
        "slow": flags.Flag(bool, ""),
    }
    argv = ["--to", "x", "a", "--fast", "b", "--sizes=3,4", "--slow=true", "--", "--c"]
    given = flags.parse("test", argv, table, doc="", operands=("A", "B..."))
    assert given.operands == ["a", "b", "--c"]
    assert (given.to, given.fast, given.sizes, given.slow) == ("x", True, (3, 4), True)
    given = flags.parse("test", ["--noslow", "a"], table, doc="", operands=("A",))
    assert (given.to, given.fast, given.sizes, given.slow) == (None, False, (1,), False)


CURED_BY_THE_USER = {
    "sweep": ["--config=configs/digits_cross.py", "--workdir=TMP/x", "--blocks=0"],
    "evaluate": ["--checkpoint=TMP/no", CONFIG, "--suite=knn", "--workdir=TMP/x"],
    "compare": ["TMP/no", "digits_cross"],
    "reconstruct": ["TMP/no.png", "--checkpoint=TMP/no.pth", "--to=TMP/x.png"],
    "attention": ["--dir=TMP", "--checkpoint=TMP/no.pth", "--to=TMP/x"],
    "report": ["TMP/no"],
    "checkpoints": ["ls", "TMP/no"],
    "cost": [CONFIG, "--config.masking.mask_ratio=1.5"],
    "estimate": [CONFIG, "--target=this", "--config.data.batch_size=0"],
    "convert": ["inspect", "TMP/no.pth"],
    "data": ["prepare", "photographs", "--data_dir=TMP/file/x"],
}


@pytest.mark.parametrize("command", CURED_BY_THE_USER)
def test_what_the_user_can_cure_is_one_line_of_every_command(command, call, tmp_path):
    (tmp_path / "file").touch()
    status, _, line = call(command, *(
        argument.replace("TMP", str(tmp_path))
        for argument in CURED_BY_THE_USER[command]
    ))
    if isinstance(status, str):  # of a command of several processes, see session.joined
        status, line = 1, status
    # There 1 has a meaning.
    assert status == (2 if command in ("compare", "checkpoints") else 1)
    assert line.startswith("error: ") and len(line.splitlines()) == 1


@pytest.mark.parametrize("command", front_door.COMMANDS)
def test_a_bug_of_any_command_keeps_its_traceback(command, call, monkeypatch):
    for error in (ValueError("a bug"), OSError("a bug"), KeyError("a bug")):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(flags, "parse", fail)
        with pytest.raises(type(error), match="a bug"):
            call(*PARSED[command])


def test_a_bug_behind_the_checks_keeps_its_traceback(call, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ValueError("a bug")

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 585, "train/loss": 0.3}\n')
    monkeypatch.setattr("crossmae_jax.visualize.bands.band", fail)
    with pytest.raises(ValueError, match="a bug"):
        call("compare", run, "digits_cross", f"--to={tmp_path / 'x.png'}")
    (run / "config.json").write_text(digits_cross.get_config().to_json())
    monkeypatch.setattr("crossmae_jax.report.run_page._page", fail)
    with pytest.raises(ValueError, match="a bug"):
        call("report", run)


def test_errors_of_files_are_the_users_only_if_they_name_one():
    for error in (
        PermissionError(errno.EACCES, "denied", "/a"), FileNotFoundError("no run"),
        FileExistsError("there is one"), OSError(errno.ENOSPC, "full", "/a"),
    ):
        with pytest.raises(errors.FileError, match=re.escape(str(error))):
            with errors.using_files():
                raise error
    with pytest.raises(ConnectionResetError), errors.setting_up():
        raise ConnectionResetError("by peer")
