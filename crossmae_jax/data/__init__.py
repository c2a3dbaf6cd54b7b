"""From disk to batches: sources (records), transforms (arrays), pipeline (batches).

Nothing in this package imports JAX, because it runs in the loader's workers.
"""
