"""Writes the page about a run, report.html: curves, numbers, settings, pictures.

    python -m crossmae_jax report RUN

RUN is the --workdir of a run, finished or not. A run writes the page itself when it
ends; this makes it for one that goes on, was interrupted or is older than the page.

Exit status 2 if the command line is wrong, 1 if RUN is no run or cannot be read.
"""

import argparse
import sys

from crossmae_jax.report import run_page


def main(argv: list[str]) -> int:
    """Writes the page and prints where it lies."""
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    try:
        print(run_page.write(parser.parse_args(argv).run))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
