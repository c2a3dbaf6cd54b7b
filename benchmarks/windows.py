"""One masked attention over all visible cells, or windows packed into groups.

    python -m benchmarks.windows --size=B/4 --window=7 --images=32

For a block of each stage of GreenMIM's Swin, 12 of 49 units visible, prints what both
ways cost: multiply-adds of an image's forward pass, counted in the traced program, and
the memory that a compiled gradient of the block needs beside inputs and results, an
image's share of it. Images share a mask. Nothing is run.
"""

import argparse
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import step
from crossmae_jax.cost import products
from crossmae_jax.models import swin, windows

GRID, NUM_VISIBLE = 7, 12


def _block(stage: swin.Stage, units: jax.Array, images: int):
    """Returns loss, parameters and input of a block that attends in moved windows."""
    block = swin.WindowBlock(stage.dim, stage.num_heads, 4.0, side=stage.side)
    row, column = jnp.divmod(jnp.arange(stage.cells**2), stage.cells)
    y, x = (
        (units[:, None] * stage.cells + inside[None]).reshape(1, -1)
        for units, inside in ((units // GRID, row), (units % GRID, column))
    )
    shift = windows.shift_of(1, side=stage.side, grid=stage.grid)

    def loss(params, images):
        within = windows.of_some(
            y, x, grid=stage.grid, side=stage.side, shift=shift
        )
        return (block.apply(params, images, within) ** 2).mean()

    images = jax.ShapeDtypeStruct((images, y.shape[1], stage.dim), jnp.float32)
    within = windows.of_some(y, x, grid=stage.grid, side=stage.side, shift=shift)
    params = jax.eval_shape(block.init, jax.random.key(0), images, within)
    return loss, params, images


def measured(stage: swin.Stage, *, images: int) -> tuple[float, float]:
    """Returns an image's multiply-adds in millions, and its share of memory in MB."""
    units = jax.random.permutation(jax.random.key(0), GRID**2)[:NUM_VISIBLE]
    loss, params, inputs = _block(stage, units, images)
    macs = sum(product.macs for product in products.trace(loss, params, inputs))
    compiled = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return macs / images / 1e6, memory / images / 1e6


def lines(encoder: swin.Swin, *, images: int) -> Iterator[str]:
    """Yields a table of the stages."""
    yield step.row([
        "stage", "visible cells", "masked: M MACs", "MB", "groups", "M MACs", "MB"
    ])
    yield step.row(["---"] * 7)
    for number, stage in enumerate(encoder.stages, start=1):
        num_cells = NUM_VISIBLE * stage.cells**2
        size = stage.side**2
        num_groups = 2 * -(-num_cells // size) - 1
        ways = [(1, num_cells), (num_groups, size)]
        kept = windows.groups(num_cells, stage.side) != ways[0]
        found = []
        for shape in ways[: 1 + (num_groups > 1)]:
            with mock.patch.object(windows, "groups", lambda *_, shape=shape: shape):
                found += [f"{x:.1f}" for x in measured(stage, images=images)]
        yield step.row([
            f"{number}", f"{num_cells}", *found[:2],
            f"{num_groups} of {size}{', kept' if kept else ''}",
            *(found[2:] or ["the same"] * 2),
        ])


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="B/4")
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--images", type=int, default=32)
    given = parser.parse_args(argv)
    encoder = swin.Swin(given.size, (GRID * 32,) * 2, given.window)
    for line in lines(encoder, images=given.images):
        print(line, flush=True)


if __name__ == "__main__":
    main()
