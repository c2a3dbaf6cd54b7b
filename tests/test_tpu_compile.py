"""Every TPU kernel and a training step, compiled for a v5e by its own compiler.

So what a chip would refuse is refused here: memory, layouts, operations. What kernels
compute is tested elsewhere, step by step on the CPU, and before each run on the chip
itself. Each shape is compiled in bfloat16, for one image: the images of a program are
unrolled, and take most of the time. More of them, float32 and other chips are those of
`make test-tpu-compile`.
"""

import functools

import pytest

from tests import compiling
from tests.attention_cases import CASES

STEP = {"step": "configs/vitb_cross_prmim.py", "overrides": compiling.NARROW}
TOO_BIG = {
    "case": "encoder B 0.75", "dtype": "bfloat16", "images": 2, "memory": 2**16
}
# Where only the number of heads differs, so does the grid, and not the kernel.
DISTINCT = list({(case[1:3], case[4:]): case.name for case in CASES}.values())
KERNELS = [{"case": name, "dtype": "bfloat16", "images": 1} for name in DISTINCT]


@functools.cache
def _compiled():
    return compiling.compile_for("v5e:2x2", [STEP, TOO_BIG, *KERNELS])


def check_kernel(job, found):
    """Raises AssertionError unless a program is the two kernels and nothing else."""
    # A bias that all images share has one gradient, the sum over the devices.
    shared = job["case"] == "window"
    assert found == {
        "kernels": {"backward": 1, "forward": 1},
        "collectives": {"all-reduce": 1} if shared else {}, "error": "",
    }


def check_step(found):
    """Raises AssertionError unless the kernels are in the step."""
    assert found["error"] == ""
    # A block of the encoder and one of the decoder.
    assert found["kernels"] == {"backward": 2, "forward": 2}
    # Gradients are summed; the images stay where they are.
    assert set(found["collectives"]) == {"all-reduce"}


def check_refused(found):
    """Raises AssertionError unless a kernel needs more memory than there is."""
    assert "RESOURCE_EXHAUSTED" in found["error"] and "Vmem" in found["error"]


@pytest.mark.parametrize("number", range(len(KERNELS)), ids=DISTINCT)
def test_the_kernels_compile_for_the_chip(number):
    check_kernel(KERNELS[number], _compiled()[2 + number])


def test_a_step_compiles_for_the_chip_with_the_kernels_in_it():
    check_step(_compiled()[0])


def test_what_a_chip_cannot_take_is_refused():
    check_refused(_compiled()[1])
