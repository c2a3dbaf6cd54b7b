"""How the state lies on TPUs, read off programs that their own compiler made.

As for the kernels (tests/test_tpu_compile.py) no TPU is needed. One process compiles
for all tests of this file.
"""

import functools

import pytest

from tests import compiling

# Wide and on few images, so that weights are most of what a block needs.
WIDE = [
    "model.decoder.dim=128", "model.decoder.depth=1", "model.decoder.num_heads=2",
    "model.fusion.kind=last",
]

GROUPS = {
    "v5e:4x4": [1, 2, 4, 8, 16],  # four hosts of four
    "3xv5e:2x2": [1, 2, 4, 12],  # not 3, 6: parts of hosts and slices
    "2xv5e:4x4": [1, 2, 4, 8, 16, 32],
}
STEP = {"step": "configs/vitb_cross.py"}
JOBS = {
    **{target: {"target": target, "groups": True} for target in GROUPS},
    "slices": {
        "target": "2xv5e:2x2", **STEP, "overrides": [*compiling.NARROW, "mesh.fsdp=4"]
    },
    **{f"depth {depth}": {
        "target": "v5e:2x4", **STEP, "overrides": [
            f"model.encoder.size=W512-D{depth}-H8/16", *WIDE, "data.batch_size=8",
            "mesh.fsdp=8",
        ],
    } for depth in (1, 3)},
    **{f"{chips} chips": {
        "target": target, **STEP, "overrides": [
            *compiling.NARROW, f"data.batch_size={2 * chips}", "mesh.fsdp=16",
        ],
    } for target, chips in (("v5e:4x4", 16), ("v5e:16x16", 256))},
}


@functools.cache
def _compiled():
    found = compiling.compile_for("v5e:2x2", list(JOBS.values()))
    return dict(zip(JOBS, found, strict=True))


@pytest.mark.parametrize("target", GROUPS)
def test_automatic_groups_fill_hosts_and_slices_or_parts_of_them(target):
    assert _compiled()[target]["groups"] == GROUPS[target]


def test_a_copy_of_the_state_stays_within_a_slice():
    found = _compiled()["slices"]
    assert found["error"] == ""
    assert found["slices"] == [0, 0, 0, 0, 1, 1, 1, 1]
    # Weights are gathered by the four chips of a slice, each from three others.
    assert found["sent"]["all-gather"] == 3 / 4 * found["exchanged"]["all-gather"]


def _kernel_bytes(width, depth):
    """Bytes of bfloat16 kernels of an encoder's blocks."""
    return 12 * width**2 * depth * 2


def test_cut_weights_are_whole_a_block_at_a_time_on_a_tpu():
    shallow, deep = (_compiled()[f"depth {depth}"] for depth in (1, 3))
    assert shallow["error"] == deep["error"] == ""
    more = _kernel_bytes(512, 2)
    # Two more blocks keep activations of one image, and no weights.
    assert deep["temporaries"] - shallow["temporaries"] < 0.5 * more
    # For the forward pass and for the gradient; gradients go back in parts.
    gathered = deep["exchanged"]["all-gather"] - shallow["exchanged"]["all-gather"]
    assert gathered <= 2 * more
    scattered = {
        name: found["exchanged"]["reduce-scatter"]
        for name, found in (("deep", deep), ("shallow", shallow))
    }
    assert scattered["deep"] - scattered["shallow"] == more // 8
    assert deep["exchanged"]["all-reduce"] < 0.02 * more  # biases and norms
    assert set(deep["exchanged"]) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_a_chip_needs_the_same_memory_among_16_and_256():
    few, many = (_compiled()[f"{chips} chips"] for chips in (16, 256))
    assert few["error"] == many["error"] == ""
    assert many["total"] == pytest.approx(few["total"], rel=0.02)
