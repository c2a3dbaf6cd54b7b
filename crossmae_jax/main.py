"""`python -m crossmae_jax.main ...` is `python -m crossmae_jax train ...`."""

import sys

from crossmae_jax.commands import session
from crossmae_jax.commands.train import main

if __name__ == "__main__":
    session.end(main, sys.argv[1:])
