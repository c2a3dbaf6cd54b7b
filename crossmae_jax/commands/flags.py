"""The dialect of all commands: how flags are written, and what is said of wrong ones.

    --name=value                          a flag; of a switch --name, or --noname
    --config=FILE --config.KEY=VALUE      a file that describes an experiment, and any
                                          of its settings changed
    NAME ...                              operands, before, between and after flags

A wrong command line ends the program in a line or two with exit status 2; `--help`
prints the command's docstring and its flags.
"""

import dataclasses
import difflib
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from crossmae_jax.runs import settings


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
      kind: makes a value of the text, and raises ValueError for one that it cannot
        read; `bool` is a switch.
      help: what it is, to be read after its name; what is missing is told by it too.
    """

    kind: Callable[[str], Any]
    help: str
    default: Any = None
    required: bool = False


_CONFIG = Flag(
    Path,
    "the file that describes the experiment, such as --config=configs/digits_cross.py; "
    "--config.KEY=VALUE changes a setting",
)


def stop(message: str) -> NoReturn:
    """Ends the program over a wrong command line, and says what is wrong."""
    print(message, file=sys.stderr)
    sys.exit(2)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns the name that was probably meant, or all of them, as a sentence."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" Did you mean {close[0]}?"
    return f" There are: {', '.join(known)}." if known else ""


def numbers(kind: type) -> Callable[[str], tuple]:
    """Returns the kind of a flag that is a list of numbers, such as 224,224."""

    def read(text: str) -> tuple:
        parts = [part for part in text.strip("()").split(",") if part.strip()]
        try:
            return tuple(map(kind, parts))
        except ValueError:
            whole = "whole " if kind is int else ""
            raise ValueError(f"expected {whole}numbers, such as 1,2.") from None

    return read


def words(text: str) -> list[str]:
    """Reads a list of words, such as knn,linear."""
    return [word.strip() for word in text.split(",") if word.strip()]


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Returns the kind of a flag that is one of some words."""

    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"there is no {text!r}.{did_you_mean(text, known)}")
        return text

    return read


def load_config(path: Path) -> ConfigDict:
    """Reads a config file; stops if there is none.

    Settings that are called otherwise now get their names, with a note about it.
    """
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
    try:
        config, old = settings.of_file(names["get_config"]())
    except TypeError as error:  # such as a name where there is a group now
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        stop(f"{path}{where}: {error}. docs/configs.md has what settings are called.")
    if old:
        moved = "; ".join(settings.moved(name, config) for name in old)
        print(f"{path} has old names, which were understood: {moved}.", file=sys.stderr)
    return config


def of_file(given: types.SimpleNamespace) -> ConfigDict:
    """Returns the configuration in the file that --config names."""
    if given.file is None:
        stop(
            "--config is missing: the file that describes the experiment, such as "
            "--config=configs/digits_cross.py."
        )
    return load_config(given.file)


def action(
    command: str, argv: Sequence[str], known: Mapping[str, str], *, doc: str
) -> str:
    """Returns the first argument of a command that does several things.

    Args:
      known: what there is to do, and what it does.
    """
    if argv and argv[0] in known:
        return argv[0]
    if _asks_for_help(argv):
        print(doc.rstrip(), "", _columns(known), sep="\n")
        sys.exit(0)
    names = list(known)
    if not argv:
        stop(f"Nothing to do: write {command} and one of {', '.join(names)}.")
    stop(f"{command} has no {argv[0]!r}.{did_you_mean(argv[0], names)}")


def parse(
    command: str,
    argv: Sequence[str],
    table: Mapping[str, Flag],
    *,
    doc: str,
    operands: Sequence[str] = (),
    config: Callable[[types.SimpleNamespace], ConfigDict] | None = None,
) -> types.SimpleNamespace:
    """Reads the arguments of a command; stops where they are wrong.

    Args:
      argv: what follows the command's name.
      table: the command's own flags by name.
      doc: what --help prints before the flags.
      operands: their names; a last one such as "IMG..." is one or several.
      config: returns the configuration that `--config.KEY=VALUE` changes, from the
        command's own flags and `file`, the path that --config names; such as `of_file`.

    Returns:
      The value of each flag, and `operands`. With `config` also the configuration,
      the settings that were `changed`, and a `title` that names file and changes.
    """
    table = {"config": _CONFIG, **table} if config else dict(table)
    if _asks_for_help(argv):
        print(doc.rstrip(), "", "Flags:", _described(table), sep="\n")
        sys.exit(0)
    parser = _Parser(command, table)
    given, rest = parser.own(argv, known_only=config is not None)
    if config is not None:
        given.file = given.config
        given.config, given.changed, rest = parser.changed(config(given), rest)
        given.title = f"`{given.file}`"
        if given.changed:
            changes = (f"`{name}={value}`" for name, value in given.changed.items())
            given.title += f" with {', '.join(changes)}"
    given.operands = rest
    parser.check_operands(rest, operands)
    for name, flag in table.items():
        if flag.required and getattr(given, name) in (None, "", ()):
            parser.stop(f"--{name} is missing: {flag.help}.")
    return given


class _Parser:
    """Reads the arguments of one command with absl's flags."""

    def __init__(self, command: str, table: Mapping[str, Flag]):
        self._program = f"python -m crossmae_jax {command}"
        self._table = table

    def stop(self, message: str) -> NoReturn:
        """Ends the program, and says how to learn more."""
        stop(f"{message}\nWrite {self._program} --help to see how it is called.")

    def own(
        self, argv: Sequence[str], *, known_only: bool
    ) -> tuple[types.SimpleNamespace, list[str]]:
        """Returns the command's own flags, and the arguments that are none.

        Args:
          known_only: leaves unknown flags among these arguments.
        """
        values = _new_values()
        for name, flag in self._table.items():
            _define(values, name, flag)
        rest = self._read(values, argv, known_only=known_only)
        given = types.SimpleNamespace(**{
            name: values[name].value if values[name].present else flag.default
            for name, flag in self._table.items()
        })
        return given, rest

    def changed(
        self, config: ConfigDict, argv: Sequence[str]
    ) -> tuple[ConfigDict, dict[str, Any], list[str]]:
        """Returns the configuration, its changes, and the other arguments."""
        # Before they are read: an unknown setting ends that in a traceback.
        _check_settings(argv, config)
        values = _new_values()
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=[self._program, *argv]
        )
        rest = self._read(values, argv)
        changes = config_flags.get_override_values(values["config"])
        return values["config"].value, changes, rest

    def _read(
        self, values: absl_flags.FlagValues, argv: Sequence[str], *,
        known_only: bool = False,
    ) -> list[str]:
        try:
            return values([self._program, *argv], known_only=known_only)[1:]
        except absl_flags.UnrecognizedFlagError as error:
            name = f"--{error.flagname}"
            known = [f"--{flag}" for flag in self._table]
            self.stop(f"Unknown flag {name}.{did_you_mean(name, known)}")
        except absl_flags.Error as error:
            self.stop(str(error))

    def check_operands(self, given: Sequence[str], names: Sequence[str]) -> None:
        """Stops if there are fewer or more than there should be."""
        if len(given) < len(names):
            self.stop(f"{names[len(given)]} is missing.")
        if len(given) > len(names) and not (names and names[-1].endswith("...")):
            rest = " ".join(given[len(names):])
            example = "config.optim.base_lr=1e-4" if "config" in self._table else (
                "name=value"
            )
            stop(
                f"Unexpected arguments: {rest}. What is set takes two dashes and an "
                f"equals sign: --{example}."
            )


class _Kind(absl_flags.ArgumentParser):
    """Lends absl a function that reads text."""

    def __init__(self, read: Callable[[str], Any]):
        self.parse = read


def _new_values() -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    values.set_gnu_getopt(True)  # operands may come before flags
    return values


def _define(values: absl_flags.FlagValues, name: str, flag: Flag) -> None:
    if flag.kind is bool:
        absl_flags.DEFINE_boolean(name, None, flag.help, flag_values=values)
        return
    absl_flags.DEFINE(
        _Kind(flag.kind), name, None, flag.help, flag_values=values,
        serializer=absl_flags.ArgumentSerializer(),
    )


def _check_settings(argv: Sequence[str], config: ConfigDict) -> None:
    """Stops at the first `--config.a.b` that the configuration does not have."""
    for argument in argv:
        setting = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        node, path = config, "--config"
        for name in setting[1].split(".") if setting else ():
            known = list(node) if isinstance(node, ConfigDict) else []
            if name not in known:
                hint = _moved(setting[1], config) or did_you_mean(name, known)
                stop(f"Unknown setting {path}.{name}.{hint}")
            node, path = node[name], f"{path}.{name}"
        if setting and isinstance(node, ConfigDict):
            hint = _moved(setting[1], config) or did_you_mean("", list(node))
            stop(f"{path} is a group of settings.{hint}")


def _moved(name: str, config: ConfigDict) -> str:
    moved = settings.moved(name, config)
    return f" {moved}." if moved else ""


def _asks_for_help(argv: Sequence[str]) -> bool:
    return not {"-h", "-help", "--help"}.isdisjoint(argv)


def _described(table: Mapping[str, Flag]) -> str:
    lines = {}
    for name, flag in table.items():
        text = flag.help + ("; must be given" if flag.required else "")
        lines[f"--{name}" if flag.kind is bool else f"--{name}=..."] = text
    return _columns(lines)


def _columns(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines), default=0)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())
