"""Experiments: one file each. None of them imports JAX or the library."""
