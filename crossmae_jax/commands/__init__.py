"""One thin file a command: flags in, one library function, text out.

Each module defines `main(argv) -> int | None`: `argv` holds the arguments after the
command's name, the result is the exit status (None is 0). The first line of the
module's docstring is the command's line in the list that `python -m crossmae_jax`
prints; it is read without importing the module, so that listing starts no JAX.

`flags` reads the arguments of all of them, `session` ends them.
"""
