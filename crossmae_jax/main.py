"""`python -m crossmae_jax.main ...` is `python -m crossmae_jax train ...`."""

import sys

from crossmae_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
