"""Every TPU kernel and a training step, compiled for the chips by their own compiler.

So what a chip would refuse is refused here: memory, layouts, operations. What kernels
compute is tested elsewhere, step by step on the CPU, and before each run on the chip
itself. Each shape is compiled for one chip in bfloat16, each kind of shape for another
in float32, the step for all. Most time goes into float32, and into the images of a
program, which are unrolled: they are two, in float32 one, and only a few programs have
all they may.
"""

import functools

import pytest

from tests import compiling
from tests.attention_cases import CASES

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# Of each head size: fewer and more queries than a block has; keys that are others.
FLOAT32 = (
    "encoder B 0.75", "encoder B, all", "448, all", "decoder 0.25", "decoder 0.75",
    "decoder 448 0.75", "encoder H 0.75", "encoder H, all", "window", "shifted window",
)
# One of each head size and bias. Of the three chips, v5p has the least memory on it.
FULL = ("encoder B 0.75", "decoder 0.25", "encoder H 0.75", "shifted window")
STEP = {"step": "configs/vitb_cross_prmim.py", "overrides": compiling.NARROW}
TOO_BIG = {
    "case": "encoder B 0.75", "dtype": "bfloat16", "images": 2, "memory": 2**16
}


def _kernels(target):
    if target == "v5e:2x2":
        return [{"case": name, "dtype": "float32", "images": 1} for name in FLOAT32]
    # Where only the number of heads differs, so does the grid, and not the kernel.
    distinct = list({(case[1:3], case[4:]): case.name for case in CASES}.values())
    half = distinct[::2] if target == "v5p:2x2x1" else distinct[1::2]
    jobs = [{"case": name, "dtype": "bfloat16", "images": 2} for name in half]
    if target == "v5p:2x2x1":
        jobs += [{"case": name, "dtype": "bfloat16", "images": 16} for name in FULL]
    return jobs


@functools.cache
def _compiled(target):
    return compiling.compile_for(target, [STEP, TOO_BIG, *_kernels(target)])


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_for_the_chip(target):
    wrong = {}
    for job, found in zip(_kernels(target), _compiled(target)[2:], strict=True):
        # A bias that all images share has one gradient, the sum over the devices.
        shared = job["case"] == "window"
        expected = {
            "kernels": {"backward": 1, "forward": 1},
            "collectives": {"all-reduce": 1} if shared else {}, "error": "",
        }
        if found != expected:
            wrong[str(job)] = found
    assert not wrong


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_compiles_for_the_chip_with_the_kernels_in_it(target):
    step = _compiled(target)[0]
    assert step["error"] == ""
    # A block of the encoder and one of the decoder.
    assert step["kernels"] == {"backward": 2, "forward": 2}
    # Gradients are summed; the images stay where they are.
    assert set(step["collectives"]) == {"all-reduce"}


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_chip_cannot_take_is_refused(target):
    found = _compiled(target)[1]
    assert "RESOURCE_EXHAUSTED" in found["error"] and "Vmem" in found["error"]
