"""Training: flags in, `train.run(config, workdir)`.

    python -m crossmae_jax.main --config=configs/vitb_cross.py \\
        --workdir=runs/vitb_cross --config.optim.base_lr=1e-4

Kept to flags on purpose: everything else can be called from a notebook.
"""

import contextlib
import difflib
import functools
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from crossmae_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None,
    "File in configs/ that describes the experiment. Any of its values can be set: "
    "--config.optim.base_lr=1e-4.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None,
    "Directory of this run: checkpoints, metrics, pictures. Given again, the run goes "
    "on where it stopped.",
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100,
    "Of several processes: after so many seconds without a sign of life from one the "
    "others stop.",
)


def stop(message: str) -> NoReturn:
    """Ends the program over a wrong command line, and says what is wrong."""
    print(message, file=sys.stderr)
    sys.exit(2)


def did_you_mean(word: str, known: list[str]) -> str:
    """Returns the name that was probably meant, or all of them, as a sentence."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]}?"
    return f" There are: {', '.join(known)}." if known else ""


def _config_path(argv: list[str]) -> Path:
    """Returns the file that --config names; stops if there is none."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        found = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if found:
            path = Path(following if found[1] is None else found[1])
            break
    else:
        stop(
            "--config is missing: the file that describes the experiment, such as "
            "--config=configs/digits_cross.py."
        )
    return path


def load_config(path: Path) -> ConfigDict:
    """Reads a config file; stops if there is none."""
    if not path.is_file():
        siblings = sorted(str(other) for other in path.parent.glob("*.py"))
        stop(f"No config file {path}.{did_you_mean(str(path), siblings)}")
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        stop(f"Not Python: {error.filename}, line {error.lineno}: {error.msg}.")
    if "get_config" not in names:
        stop(
            f"{path} has no function get_config; name a file that describes an "
            "experiment, such as configs/digits_cross.py."
        )
    return names["get_config"]()


def _check_settings(argv: list[str], config: ConfigDict) -> None:
    """Stops at the first `--config.a.b` that the configuration does not have."""
    for argument in argv:
        found = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        node, path = config, "--config"
        for name in found[1].split(".") if found else ():
            known = list(node) if isinstance(node, ConfigDict) else []
            if name not in known:
                hint = did_you_mean(name, known)
                stop(f"Unknown setting {path}.{name}.{hint}")
            node, path = node[name], f"{path}.{name}"
        if found and isinstance(node, ConfigDict):
            stop(f"{path} is a group of settings.{did_you_mean('', list(node))}")


def parse_config(argv: list[str], parse: Callable[[list[str]], list[str]]) -> Path:
    """Parses flags of which one is --config, and returns the file that it names.

    A misspelt setting or file ends in a suggestion.

    Args:
      parse: sets the flags and returns the arguments that are none.
    """
    path = _config_path(argv)
    # Before the flags are parsed: an unknown setting ends that in a traceback.
    _check_settings(argv, load_config(path))
    _check_no_rest(parse(argv))
    return path


def parse_command(
    name: str, argv: list[str], values: flags.FlagValues, *, usage: str
) -> tuple[Path, str]:
    """Parses the flags of a command that takes --config; stops where they are wrong.

    Returns the file, and a line that names it and the settings that were changed.

    Args:
      argv: what follows the command's name.
      values: the command's own flags, to which --config is added.
      usage: of the command's own flags.
    """
    argv = [f"crossmae-jax {name}", *argv]
    config_flags.DEFINE_config_file(
        "config", None, "File that describes an experiment.", flag_values=values,
        sys_argv=argv,
    )

    path = parse_config(argv, functools.partial(
        _parse, values, usage=f"--config=FILE [--config.KEY=VALUE ...] {usage}"
    ))
    changes = config_flags.get_override_values(values["config"])
    title = f"`{path}`"
    if changes:
        title += " with " + ", ".join(f"`{k}={v}`" for k, v in changes.items())
    return path, title


def parse_settings(
    name: str, argv: list[str], values: flags.FlagValues, config: ConfigDict, *,
    usage: str,
) -> None:
    """Parses the flags of a command whose --config is known and can only be changed.

    Args:
      argv: what follows the command's name; likewise the other arguments are those of
        `parse_command`.
    """
    # Before they are parsed: an unknown setting ends that in a traceback.
    _check_settings(argv, config)
    argv = [f"crossmae-jax {name}", *argv]
    config_flags.DEFINE_config_dict(
        "config", config, "Settings of a run.", flag_values=values, sys_argv=argv
    )
    _check_no_rest(_parse(values, argv, usage=usage))


def _parse(values: flags.FlagValues, argv: list[str], *, usage: str) -> list[str]:
    try:
        return values(argv)
    except flags.Error as error:
        stop(f"{error}\nWrite {usage}, values of the type that they have in the file.")


def _check_no_rest(rest: list[str]) -> None:
    if len(rest) > 1:
        stop(
            f"Unexpected arguments: {' '.join(rest[1:])}. Settings take two dashes and "
            "an equals sign: --config.optim.base_lr=1e-4."
        )


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of training."""
    if any(argument.lstrip("-").startswith("help") for argument in argv):
        return app.parse_flags_with_usage(argv)
    path = parse_config(argv, app.parse_flags_with_usage)
    if not _WORKDIR.value:
        stop(
            "--workdir is missing: the directory of this run, such as "
            f"--workdir=runs/{path.stem}. Given again, the run goes on where it "
            "stopped."
        )
    return argv[:1]


@contextlib.contextmanager
def known_errors() -> Iterator[None]:
    """Ends the program with one line for an error that says what to do.

    Other errors are bugs, and keep their traceback.
    """
    try:
        yield
    except errors.UserError as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def session(
    heartbeat_seconds: int = 100, *, agree_to_stop: bool = True
) -> Iterator[None]:
    """Connects this process with the others of its command, if it has others.

    Errors end the program as in `known_errors`. To be entered before JAX is used.
    Arguments are those of `cluster.join`.
    """
    from crossmae_jax.distributed import cluster

    with cluster.leaving(heartbeat_seconds), known_errors():
        cluster.join(
            heartbeat_seconds=heartbeat_seconds, agree_to_stop=agree_to_stop
        )
        yield


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    del argv  # nothing but the program's name: see parse_flags
    # Libraries report every file they open; a run's own first line says how it starts.
    logging.set_verbosity(logging.WARNING)
    # Loader workers import this file anew, and must not import JAX.
    from crossmae_jax import train

    with session(_HEARTBEAT.value):
        train.run(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
