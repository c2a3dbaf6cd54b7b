"""Writes the page about a run, report.html: curves, numbers, settings, pictures.

    python -m crossmae_jax report RUN

RUN is the --workdir of a run, finished or not. A run writes the page itself when it
ends; this makes it for one that goes on, was interrupted or is older than the page.

Exit status 2 if the command line is wrong, 1 if RUN is no run or cannot be read.
"""

from collections.abc import Sequence

from crossmae_jax.commands import flags, session


@session.command()
def main(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    given = flags.parse("report", argv, {}, doc=__doc__, operands=("RUN",))
    from crossmae_jax.report import run_page

    print(run_page.write(given.operands[0]))
