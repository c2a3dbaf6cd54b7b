"""Exchanges between devices, read from the text of compiled programs."""

import dataclasses

import jax
import pytest

from crossmae_jax import collectives

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.2 = f32[8]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %all-reduce.2)
}

%less (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5), backend_config={}
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT, metadata={}
}

%inner (p: bf16[2,3]) -> bf16[8,3] {
  ROOT %all-gather.1 = bf16[8,3]{1,0} all-gather(%p), dimensions={0}
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %all-reduce.1 = (f32[16,2]{1,0:T(8,128)S(1)}, pred[]{:T(512)}, /*index=2*/s4[3]{0}) \
all-reduce(%x, %y, %z), to_apply=%add, metadata={op_name="jit(step) all-gather(x)"}
  %w = (s32[], f32[8]{0}) while(%t), condition=%less, body=%turn TRIPS
  %all-gather-start.2 = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%q), dimensions={0}
  %all-gather-done.2 = bf16[8]{0} all-gather-done(%all-gather-start.2)
  %start = ((bf16[2,3]), bf16[8,3]) async-start(%p), calls=%inner
  %done = bf16[8,3]{1,0} async-done(%start), calls=%inner
  %reduce-scatter.1 = f32[4]{0} reduce-scatter(%x), dimensions={0}, to_apply=%add
  ROOT %collective-permute.1 = f32[16]{0} collective-permute(%x)
}
""".replace("\\\n", "")
REDUCED = 16 * 2 * 4 + 1 + 2
NOTED = ', backend_config={"known_trip_count":{"n":"3"}}'


@pytest.mark.parametrize("text, turns, exact", [
    (HLO.replace("TRIPS", NOTED), 3, True),
    (HLO.replace("TRIPS", ""), 5, True),
    (HLO.replace("TRIPS", "").replace("direction=LT", "direction=NE"), 1, False),
])
def test_exchanges_are_counted_with_loops_and_without_starts(text, turns, exact):
    found = [dataclasses.astuple(each) for each in collectives.read(text)]
    assert found == [
        ("all-reduce", 1 + turns, REDUCED + turns * 8 * 4, exact),
        ("all-gather", 2, 8 * 2 + 8 * 3 * 2, True),
        ("reduce-scatter", 1, 4 * 4, True),
        ("collective-permute", 1, 16 * 4, True),
    ]


@pytest.mark.parametrize("kind, sent", [
    ("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 300),
    ("all-to-all", 75), ("collective-permute", 100),
])
def test_what_a_device_sends_of_100_bytes_to_three_others(kind, sent):
    assert collectives.Collective(kind, 1, 100).sent(4) == sent


def test_a_program_that_exchanges_nothing_is_read_as_that():
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert collectives.read(compiled.as_text()) == []
