"""The front door: `python -m crossmae_jax COMMAND ...`, or `crossmae-jax COMMAND ...`.

Without a command it lists them. A command is a module in `crossmae_jax.commands`,
imported only when it is called.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from typing import NoReturn

from crossmae_jax.commands import session

COMMANDS = {
    "train": "crossmae_jax.commands.train",
    "sweep": "crossmae_jax.commands.sweep",
    "evaluate": "crossmae_jax.commands.evaluate",
    "compare": "crossmae_jax.commands.compare",
    "reconstruct": "crossmae_jax.commands.reconstruct",
    "attention": "crossmae_jax.commands.attention",
    "checkpoints": "crossmae_jax.commands.checkpoints",
    "report": "crossmae_jax.commands.report",
    "cost": "crossmae_jax.commands.cost",
    "estimate": "crossmae_jax.commands.estimate",
    "convert": "crossmae_jax.commands.convert",
    "data": "crossmae_jax.commands.data",
    "doctor": "crossmae_jax.commands.doctor",
    "verify-resume": "crossmae_jax.commands.verify_resume",
    "debug-nan": "crossmae_jax.commands.debug_nan",
}


def _summary(module: str) -> str:
    """Returns the first line of a module's docstring without importing the module."""
    source = importlib.util.find_spec(module).loader.get_source(module)
    return ast.get_docstring(ast.parse(source)).partition("\n")[0]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {_summary(path)}" for name, path in COMMANDS.items()]
    return "\n".join([
        "Usage: python -m crossmae_jax COMMAND ...", "", *lines, "",
        "python -m crossmae_jax COMMAND --help says more.",
    ])


def main(argv: list[str] | None = None) -> int:
    """Runs the command named first and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f" Did you mean {close[0]!r}?" if close else ""
        print(f"Unknown command {name!r}.{suggestion}\n\n{_usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name]).main(rest) or 0


def program() -> NoReturn:
    """Runs a command of the command line, and ends."""
    session.end(main, sys.argv[1:])


if __name__ == "__main__":
    program()
