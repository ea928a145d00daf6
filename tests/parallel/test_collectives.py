"""What a compiled program sends and moves, read from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cascade.parallel import hlo
from cascade.parallel.collectives import BETWEEN, SENT, collectives, group_size, ideal_bytes
from cascade.parallel.mesh import make_mesh

# As the TPU compiler writes them, shortened: a gather in a loop of four, a reduce-scatter as a
# fused reduction and slice, a permutation begun and done, what goes to another slice.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%condition (p: (s32[], f32[256,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[256,128])) -> (s32[], f32[256,128]) {
  %q = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  %w = f32[256,128]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %gather = f32[1024,128]{1,0:T(8,128)S(1)} all-gather(%w), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[256,128]{1,0:T(8,128)}) tuple(%i, %w)
}

%scatter (input: bf16[1024,128]) -> bf16[256,128] {
  %input = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)
  %reduced = bf16[1024,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=2, \
replica_groups=[2,4]<=[8], to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = bf16[256,128]{1,0:T(8,128)(2,1)} dynamic-slice(%reduced, %at, %at)
}

ENTRY %main.1 (x: f32[256,128], y: bf16[1024,128]) -> bf16[256,128] {
  %x = f32[256,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) while(%start), condition=%condition, \
body=%body
  %around = (f32[256,128]{1,0:T(8,128)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %moved = f32[256,128]{1,0:T(8,128)} collective-permute-done(%around)
  %token = token[] after-all()
  %send = (bf16[1024,128]{1,0}, u32[], token[]) send(%y, %token), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%y), kind=kCustom, calls=%scatter
}
"""
SHARD, WHOLE = 4 * 256 * 128, 2 * 1024 * 128  # bytes of x and of y


def test_each_kind_is_counted_as_often_as_it_runs():
    found = collectives(hlo.parse(PROGRAM), devices=8, slices=2)
    assert found == {
        "all-gather": (4 * SHARD * 3, 4),
        "reduce-scatter": (WHOLE * 3 / 4, 1),
        "collective-permute": (SHARD, 1),
        BETWEEN: (WHOLE, 1),
    }
    assert next(iter(found)) == "all-gather"


def test_memory_is_counted_where_it_isnt_on_the_chip():
    gather = 4 * SHARD  # its result is in VMEM
    permute, send, scatter = 2 * SHARD, WHOLE, WHOLE + WHOLE / 4
    assert hlo.traffic(hlo.parse(PROGRAM)) == gather + permute + send + scatter


# A gather that the TPU compiler spreads over a fusion which does other work meanwhile.
SPREAD = """HloModule jit_step, is_scheduled=true

%begin (w: bf16[64,128]) -> (bf16[64,128], bf16[512,128], u32[]) {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"flag_start":"-1"}
  ROOT %begun = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%all), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (w: bf16[64,128], g: bf16[512,128], f: u32[], x: f32[256,128]) -> \
(f32[256,128], bf16[64,128], bf16[512,128], bf16[512,128], u32[]) {
  %x = f32[256,128]{1,0:T(8,128)} parameter(3)
  %y = f32[256,128]{1,0:T(8,128)} negate(%x)
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %all = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"flag_start":"2"}
  ROOT %both = (f32[256,128]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
tuple(%y, %w, %g, %all, %f)
}

%end (w: bf16[64,128], g: bf16[512,128], f: u32[]) -> bf16[512,128] {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %all = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"flag_start":"2"}
  ROOT %done = bf16[512,128]{1,0:T(8,128)(2,1)} custom-call(%w, %g, %all, %f), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main.2 (w: bf16[64,128], x: f32[256,128]) -> bf16[512,128] {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[256,128]{1,0:T(8,128)} parameter(1)
  %s = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%w), kind=kCustom, calls=%begin
  %s0 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %s1 = bf16[512,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %s2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %m = (f32[256,128]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, \
bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[512,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%s0, %s1, %s2, %x), kind=kOutput, calls=%meanwhile
  %m1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=1
  %m2 = bf16[512,128]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=3
  %m3 = u32[]{:S(2)} get-tuple-element(%m), index=4
  ROOT %out = bf16[512,128]{1,0:T(8,128)(2,1)} fusion(%m1, %m2, %m3), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_is_spread_over_fusions_is_one():
    module, part = hlo.parse(SPREAD), 2 * 64 * 128
    assert collectives(module, devices=8) == {"all-gather": (7 * part, 1)}
    negation = 2 * 4 * 256 * 128
    assert hlo.traffic(module) == part + 8 * part + negation


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", 8),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("channel_id=1", 8),
    ],
)
def test_groups_are_read_in_every_form(groups, size):
    line = hlo.Instruction("x", "all-gather", (), (), f"%w), {groups}, dimensions={{0}}")
    assert group_size(line, 8) == size


def test_a_reduction_costs_what_its_halves_cost():
    for n in (2, 7, 256):
        halves = SENT["reduce-scatter"](8.0, n) + SENT["all-gather"](8.0 / n, n)
        assert SENT["all-reduce"](8.0, n) == pytest.approx(halves)


def test_the_least_to_train_is_three_passes_over_bfloat16_parameters():
    assert ideal_bytes(1e9, 0, fsdp=1, data=1) == 0
    assert ideal_bytes(1e9, 0, fsdp=512, data=1) == pytest.approx(3 * 2e9, rel=2.1e-3)
    assert ideal_bytes(0, 1e9, fsdp=16, data=16) == pytest.approx(2 * 2e9, rel=4e-3)


def test_a_program_of_this_machine_is_read():
    """Eight devices gather eight shares, in every round of a scan."""
    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    share, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())

    def step(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(layer, x, weights)[0]

    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=share)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text = jax.jit(step).lower(weights, x).compile().as_text()
    found = collectives(hlo.parse(text), devices=8)
    assert found["all-gather"].bytes == 5 * 4 * 64 * 64 * 7 / 8
    assert hlo.traffic(hlo.parse(text)) > found["all-gather"].bytes


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")
