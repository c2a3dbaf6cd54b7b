"""What the TPU's compiler says of more chips, more images and larger models.

    make test-tpu-compile

No part of `make test`, whose files begin with "test_": it takes minutes. As there, no
TPU is needed.
"""

import functools
import re

import pytest

from tests import compiling
from tests.test_tpu_compile import (
    DISTINCT,
    STEP,
    TOO_BIG,
    check_kernel,
    check_refused,
    check_step,
)

# Of each head size: fewer and more queries than a block has; keys that are others.
FLOAT32 = (
    "encoder B 0.75", "encoder B, all", "448, all", "decoder 0.25", "decoder 0.75",
    "decoder 448 0.75", "encoder H 0.75", "encoder H, all", "window", "shifted window",
)
# One of each head size and bias. Of the chips, v5p has the least memory on it.
FULL = ("encoder B 0.75", "decoder 0.25", "encoder H 0.75", "shifted window")
KERNELS = {
    "v5e:2x2": [{"case": name, "dtype": "float32", "images": 1} for name in FLOAT32],
    "v5p:2x2x1": [
        *({"case": name, "dtype": "bfloat16", "images": 2} for name in DISTINCT[::2]),
        *({"case": name, "dtype": "bfloat16", "images": 16} for name in FULL),
    ],
    "v6e:2x2": [
        {"case": name, "dtype": "bfloat16", "images": 2} for name in DISTINCT[1::2]
    ],
}


@functools.cache
def _compiled(target):
    return compiling.compile_for(target, [STEP, TOO_BIG, *KERNELS[target]])


@pytest.mark.parametrize(("target", "number"), [
    (target, number) for target in KERNELS for number in range(len(KERNELS[target]))
])
def test_the_kernels_compile_for_the_chip(target, number):
    check_kernel(KERNELS[target][number], _compiled(target)[2 + number])


@pytest.mark.parametrize("target", KERNELS)
def test_a_step_compiles_for_the_chip_with_the_kernels_in_it(target):
    check_step(_compiled(target)[0])


@pytest.mark.parametrize("target", KERNELS)
def test_what_a_chip_cannot_take_is_refused(target):
    check_refused(_compiled(target)[1])


def test_vit_h_with_4096_images_fits_256_chips():
    """By its growth with depth; compiled whole it takes minutes (docs/scale.md)."""
    one, two = compiling.compile_for("v5e:16x16", [
        {"step": "configs/vith_cross.py", "overrides": [
            f"model.encoder.size=W1280-D{depth}-H16/14", f"model.decoder.depth={depth}",
            "data.batch_size=4096", "mesh.fsdp=4",
        ]} for depth in (1, 2)
    ])
    assert one["error"] == two["error"] == ""
    block = two["total"] - one["total"]  # of the encoder, and of the decoder
    assert block > 12 * 1280**2 * 3 * 4 / 4  # weights and moments over four chips
    # 32 of both, though the decoder has 12; half of a chip's memory to spare.
    assert one["total"] + 31 * block < 8e9


def _estimated(*flags):
    """Returns what `estimate` prints of a step on four chips, and its megabytes."""
    config, overrides = STEP["step"], STEP["overrides"]
    ran = compiling.run_beside(
        "v5e:2x2", [
            "crossmae_jax", "estimate", f"--config={config}", "--target=v5e:2x2",
            *(f"--config.{setting}" for setting in overrides), *flags,
        ],
        JAX_EXEC_TIME_OPTIMIZATION_EFFORT="0.0",
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, float(re.search(r"\| all +\| +([.\d]+) \|", ran.stdout)[1])


def test_what_is_soon_compiled_is_not_kept_on_the_chip_as_a_whole():
    soon, its_memory = _estimated()
    as_training, memory = _estimated("--optimized")
    assert "not run, nor made to run fast" in soon and "memory not said" in soon
    assert "not run\n" in as_training and "as the compiler counts" in as_training
    assert "TPU kernels" in soon and "TPU kernels" in as_training
    # As so small a step is, if that is asked for. Of a large one memory is alike.
    assert its_memory > 1.5 * memory
