"""What a step holds in memory is read off what the compiler wrote about it."""

import re

import pytest

from benchmarks import held
from crossmae_jax.cost import estimate

SIZES = [
    "model.encoder.size=W64-D2-H2/4", "model.decoder.dim=32", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "model.dtype=bfloat16",
]
CONFIG = "configs/digits_cross.py"


def test_the_fullest_moment_is_that_of_most_bytes():
    first, second, third = (
        held.Held("a", "x", 4, 0, 5), held.Held("b", "x", 3, 5, 9),
        held.Held("c", "x", 6, 6, 7),
    )
    assert held.fullest([first, second]) == [first, second]
    assert held.fullest([first, second, third]) == [second, third]


@pytest.mark.parametrize(("origin", "kind"), [
    ("jit(f)/jvp(M)/encoder/blocks_0/blocks_0.<lambda>/fc1/dot_general",
     "inputs of GELU"),
    ("jit(f)/jvp(M)/decoder/decoder_blocks_1/attn.project/kv/dot_general",
     "queries, keys, values"),
    ("jit(f)/transpose(jvp(M))/encoder/blocks_0/fc1/dot_general",
     "gradients, computed again"),
    ("", held.OTHER),
])
def test_arrays_are_told_apart_by_the_operation_that_makes_them(origin, kind):
    assert held.Held("a", origin, 1, 0, 1).kind == kind


def test_what_is_held_is_most_of_the_temporaries_that_the_compiler_counts(
    monkeypatch, capsys
):
    found, of_step = [], held.of_step
    monkeypatch.setattr(
        held, "of_step", lambda *arguments: found.extend(of_step(*arguments)) or found
    )
    held.main([
        f"--config={CONFIG}", "--batch=256", "--target=this", "--most=2",
        *(f"--override={override}" for override in SIZES),
    ])
    printed = capsys.readouterr().out
    assert "batch 256: compiled for this, not run" in printed
    assert re.findall(r"^\| ([\w ,]+) \| [\d.]+ \|$", printed, re.MULTILINE) == [
        "gradients, computed again", "inputs of GELU", "queries, keys, values",
        "results of attention",
        "residual stream", "contexts", "GELU", "target, loss", "other", "all",
    ]
    assert len(printed.split("digits_cross:")[1].strip().splitlines()) == 2
    config = held.step.load_config(CONFIG, overrides=[*SIZES, "data.batch_size=256"])
    counted = estimate.estimate(config, "this").memory.temporaries
    assert 0.8 * counted < sum(each.num_bytes for each in found) <= counted
