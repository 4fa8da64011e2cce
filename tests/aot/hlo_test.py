"""Bytes read off HLO, against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest

from vtriune_jax.aot import hlo

pytestmark = pytest.mark.usefixtures("optimised")

LOOP = """\
HloModule jit_step, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%fused (p: f32[8,16], q: f32[16]) -> f32[16] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  ROOT %all-gather.1 = f32[16]{0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter (r: f32[64]) -> f32[16] {
  %r = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%r), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[16]{0} slice(%sum), slice={[0:16]}
}

%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)S(1)}) parameter(0)
  %fusion.1 = f32[16]{0:T(128)S(1)} fusion(%x, %y), kind=kLoop, calls=%fused
  %fusion.2 = f32[16]{0:T(128)S(1)} fusion(%x, %y), kind=kLoop, calls=%fused
  %fusion.3 = f32[16]{0:T(128)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %v)
}

%condition (t: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %starts = (bf16[10]{0}, bf16[40]{0}) all-gather-start(%b), channel_id=1, replica_groups={{0,1,2,3}}
  %permute = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=2
  %reduce = (f32[2,3]{1,0}, f32[4]{0}) all-reduce(%d, %e), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}
  %send.1 = (f32[25]{0:T(128)}, u32[], token[]) send(%f, %g), channel_id=4, is_host_transfer=true
  %written = f32[100]{0} dynamic-update-slice(%big, %starts2, %zero)
  %starts2 = f32[2]{0} copy(%a)
  ROOT %last = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_turn_and_repeated_parts_of_a_collective_once():
    found = hlo.Module(LOOP).traffic().collectives
    assert found == {
        "all-gather": 5 * 16 * 4 * 3 / 4 + 40 * 2 * 3 / 4,
        "reduce-scatter": 5 * 64 * 4 * 3 / 4,
        "collective-permute": 6 * 4,
        "all-reduce": 2 * (6 + 4) * 4 * 3 / 4,
        hlo.BETWEEN_SLICES: 100,
    }


def test_memory_is_what_is_written_outside_of_the_chip_twice_and_updates_are_in_place():
    copies = {"starts": 100, "permute": 2 * 24 + 0, "reduce": 40, "send": 104, "copy": 8}
    updated = 8  # two numbers of a hundred
    loop = 5 * 16 * 4  # what lies in S(1) is free
    assert hlo.Module(LOOP).traffic().memory == 2 * (sum(copies.values()) + updated + loop)


GPU = """\
HloModule jit_step

%update (p: f32[9,100], q: f32[100], i: s32[]) -> f32[9,100] {
  %p = f32[9,100]{1,0} parameter(0)
  %q = f32[1,100]{1,0} parameter(1)
  ROOT %put = f32[9,100]{1,0} dynamic-update-slice(%p, %q, %i)
}

%slice (p: f32[9,100], i: s32[]) -> f32[100] {
  %p = f32[9,100]{1,0} parameter(0)
  %got = f32[1,100]{1,0} dynamic-slice(%p, %i)
  ROOT %flat = f32[100]{0} bitcast(%got)
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %first = ((f32[9,100]{1,0}, s32[]), f32[100]{0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%slice
  %second = ((f32[9,100]{1,0}, f32[1,100]{1,0}, s32[]), f32[9,100]{1,0}, u32[]) fusion-start(%x, %y, %i), kind=kLoop, calls=%update
  %scatter = ((f32[64]{0}, f32[32]{0}), (f32[16]{0}, f32[8]{0})) reduce-scatter-start(%b), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %last = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_asynchronous_operations_of_gpus_name_their_operands_too():
    found = hlo.Module(GPU).traffic()
    assert found.collectives == {"reduce-scatter": (16 + 8) * 4 * 3}
    assert found.memory == 2 * (400 + 400 + (64 + 32 + 16 + 8) * 4)


def test_a_compiled_scan_is_read_with_its_trip_count():
    def scan(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=7)[0]

    module = hlo.Module(jax.jit(scan).lower(jnp.ones((64, 64))).compile().as_text())
    assert 7 in dict(module.turns()).values()
    once = hlo.Module(
        jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((64, 64))).compile().as_text()
    )
    assert module.traffic().memory >= 7 * once.traffic().memory / 2
    assert once.largest(1)[0][:2] == (64 * 64 * 4, "f32[64,64]")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=2,'b'=3,'c'=4] {'a', 'c'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("source_target_pairs={{0,1}}", 1),
    ],
)
def test_groups_in_all_notations(groups, size):
    assert hlo.group_size(groups) == size
