"""Exchanges between devices, read from the text of compiled programs."""

import dataclasses

import jax
import pytest

from crossmae_jax.cost import collectives

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%turn (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.2 = f32[8]{0} all-reduce(%x), channel_id=1, \
replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %all-reduce.2)
}

%less (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5), backend_config={}
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT, metadata={}
}

%inner (p: bf16[2,3]) -> bf16[8,3] {
  ROOT %all-gather.1 = bf16[8,3]{1,0} all-gather(%p), dimensions={0}
}

%async_collective_fusion.1 (p: bf16[2,3]) -> bf16[8,3] {
  ROOT %all-gather.3 = bf16[8,3]{1,0} all-gather(%p), channel_id=9, \
replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[2,3]) -> bf16[8,3] {
  ROOT %all-gather.4 = bf16[8,3]{1,0} all-gather(%p), channel_id=9, \
replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}, dimensions={0}
}

%all-reduce-scatter.7 (x: f32[4], y: f32[6]) -> (f32[2], f32[3]) {
  %all-reduce.9 = (f32[4]{0}, f32[6]{0}) all-reduce(%x, %y), channel_id=1, \
replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %cut = (f32[2]{0}, f32[3]{0}) tuple(%a, %b)
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %all-reduce.1 = (f32[16,2]{1,0:T(8,128)S(1)}, pred[]{:T(512)}, /*index=2*/s4[3]{0}) \
all-reduce(%x, %y, %z), channel_id=1, to_apply=%add, \
metadata={op_name="jit(step) all-gather(x)"}
  %w = (s32[], f32[8]{0}) while(%t), condition=%less, body=%turn TRIPS
  %all-gather-start.2 = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%q), dimensions={0}
  %all-gather-done.2 = bf16[8]{0} all-gather-done(%all-gather-start.2)
  %start = ((bf16[2,3]), bf16[8,3]) async-start(%p), calls=%inner
  %done = bf16[8,3]{1,0} async-done(%start), calls=%inner
  %fusion.1 = bf16[8,3]{1,0} fusion(%p), calls=%async_collective_fusion.1
  %fusion.2 = bf16[8,3]{1,0} fusion(%p), calls=%async_collective_fusion.2
  %fusion.3 = (f32[2]{0}, f32[3]{0}) fusion(%x, %y), calls=%all-reduce-scatter.7
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
    found = [dataclasses.astuple(each) for each in collectives.read(text, 4)]
    reduced, gathered = REDUCED + turns * 8 * 4, 8 * 2 + 2 * 8 * 3 * 2
    assert found == [
        ("all-reduce", 1 + turns, reduced, 2 * 3 / 4 * reduced, exact),
        ("all-gather", 3, gathered, 3 / 4 * gathered, True),
        ("reduce-scatter", 2, 4 * 4 + 5 * 4, 3 * 4 * 4 + 1 * 5 * 4, True),
        ("collective-permute", 1, 16 * 4, 16 * 4, True),
    ]


@pytest.mark.parametrize("kind, sent", [
    ("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 300),
    ("all-to-all", 75), ("collective-permute", 100),
])
@pytest.mark.parametrize("groups", [
    "", "replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=[2,4]<=[8]",
    "replica_groups=mesh['a'=2,'b'=4] {'b'}", "replica_groups=mesh['a'=8] {'a':(2)4}",
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
])
def test_what_a_device_sends_of_100_bytes_to_three_others(kind, sent, groups):
    text = f"ENTRY %m (x: u8[9]) -> u8[9] {{\n  %r = u8[100] {kind}(%x), {groups}\n}}"
    (found,) = collectives.read(text, 8 if groups else 4)
    assert found == collectives.Collective(kind, 1, 100, float(sent))


def test_a_device_alone_sends_nothing():
    line = "%r = u8[100] all-reduce(%x), replica_groups={{0},{1}}"
    assert collectives.read(f"ENTRY %m (x: u8[9]) -> u8[9] {{\n  {line}\n}}", 2) == []


def test_a_program_that_exchanges_nothing_is_read_as_that():
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert collectives.read(compiled.as_text(), 1) == []
