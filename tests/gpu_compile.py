"""Attention's kernels and a training step, compiled for an H200 that is not there.

    make test-gpu-compile

No part of `make test`, whose files begin with "test_": NVIDIA's packages are large.
"""

import functools
import re

import pytest

from tests import compiling
from tests.attention_cases import CASES

STEP = {"step": "configs/vitb_cross_prmim.py", "overrides": compiling.NARROW}


@functools.cache
def _compiled():
    """Returns what became of the step, and by name of cases; of the candidate's too."""
    jobs = [{"case": c.name, "dtype": "bfloat16", "images": 2} for c in CASES]
    candidates = [{"candidate": True, **job} for job in jobs]
    step, *found = compiling.compile_for("h200", [STEP, *jobs, *candidates])
    taken, tried = (
        {case.name: one for case, one in zip(CASES, part, strict=True)}
        for part in (found[:len(CASES)], found[len(CASES):])
    )
    return step, taken, tried


def _directions(kernels):
    """Returns how many calls of cuDNN go forward, and how many backward."""
    backward = sum(n for name, n in kernels.items() if name.endswith("Backward"))
    return sum(kernels.values()) - backward, backward


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cudnn_takes_every_shape(case):
    found = _compiled()[1][case.name]
    assert found["error"] == ""
    assert _directions(found["kernels"]) == (1, 1)
    assert all(re.match(r"__cudnn\$fmha", name) for name in found["kernels"])
    assert (case.bias is not None) == any("Bias" in name for name in found["kernels"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_candidate_compiles_at_short_shapes_and_refuses_others(case):
    found = _compiled()[2][case.name]
    if case.bias is not None or case.keys > 256:
        assert found["error"].startswith("NotImplementedError: The Triton kernels take")
    else:
        assert found["kernels"] == {"__gpu$xla.gpu.triton": 2}, found["error"]


def test_a_step_compiles_with_cudnn_in_it():
    step, *_ = _compiled()
    assert step["error"] == ""
    assert _directions(step["kernels"]) == (2, 2)  # a block of encoder and of decoder
