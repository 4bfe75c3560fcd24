"""What a compiled program launches and sends is read right."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from implicit_slots.runtime.programs import (
    Collective,
    Kernel,
    read_collectives,
    read_kernels,
    summarize,
)

# Shaped like XLA's text, with every way of naming the devices and of being called.
TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=8, replica_count=1

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%wrapped (p: bf16[4,16]) -> bf16[2,16] {
  ROOT %reduce-scatter.1 = bf16[2,16]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8]
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-to-all.1 = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %x)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add.clone
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}

%less (p: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: f32[16], p1: pred[]) -> f32[16] {
  %all-reduce.1 = (f32[64,64]{1,0}, f32[64]{0}, /*index=2*/f32[]) all-reduce(%a, %b, /*index=2*/%c), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, to_apply=%add.clone, metadata={op_name="jit(f)/while/body=(x)"}
  %all-gather-start.1 = (f32[2,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)}) all-gather-start(%p0), replica_groups=mesh['x'=8] {'x':(1)4}, dimensions={0}
  %all-gather-done.1 = f32[8,16]{1,0} all-gather-done(%all-gather-start.1)
  %move = (u8[40]{0}, u8[40]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %started = ((bf16[4,16]{1,0}), bf16[2,16]{1,0}, s32[]) async-start(%p), calls=%wrapped
  %done = bf16[2,16]{1,0} async-done(%started), calls=%wrapped
  %w.1 = (s32[], f32[8]{0}) while(%t), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = (s32[], f32[8]{0}) while(%t), condition=%less, body=%outer
  ROOT %f = f32[16]{0} fusion(%p0), kind=kLoop, calls=%add.clone
}
"""  # noqa: E501

# The same, as the installed XLA says it: each kind once, in a loop of three passes.
PROGRAM = """
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from implicit_slots.runtime.programs import read_collectives
mesh = jax.make_mesh((4,), ("x",))
def local(x):
    def body(x, _):
        x = lax.all_to_all(x + 1, "x", 0, 0)
        whole = jnp.sin(lax.all_gather(x, "x", tiled=True))
        x = lax.psum_scatter(whole, "x", tiled=True)
        x = lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
        return x + lax.psum(x.sum(), "x"), None
    return lax.scan(body, x, None, length=3)[0]
sharding = NamedSharding(mesh, P("x"))
shape = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=sharding)
program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
for found in read_collectives(program.lower(shape).compile().as_text()):
    print(found.kind, found.bytes, found.group, found.times, found.exact)
"""


def test_every_form_is_read():
    found = {(c.kind, c.exact): c for c in read_collectives(TEXT)}
    assert found == {
        (c.kind, c.exact): c
        for c in (
            Collective("all-reduce", 4 * (64 * 64 + 64 + 1), 8),
            Collective("all-gather", 4 * 8 * 16, 4),
            Collective("collective-permute", 40, 8),
            Collective("reduce-scatter", 2 * 4 * 16, 2),
            Collective("all-to-all", 4 * 2 * 4, 2, 15),
            Collective("all-to-all", 4 * 2 * 4, 2, 3, exact=False),
            Collective("all-reduce", 4 * 8, 8, 1, exact=False),
        )
    } | {("all-reduce", True): found["all-reduce", True]}
    # Two of one kind that differ stay two; the loop's runs five times.
    reduced = [c for c in read_collectives(TEXT) if c[0] == "all-reduce" and c.exact]
    assert [(c.bytes, c.times) for c in reduced] == [(16644, 1), (32, 5)]
    total = summarize(read_collectives(TEXT))["total"]
    assert not total["exact"]
    assert total["count"] == 1 + 1 + 1 + 1 + 15 + 3 + 5 + 1


def test_the_installed_compiler_is_read():
    arguments = [sys.executable, "-c", PROGRAM]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split("\n")) == [
        "",
        "all-gather 320 4 3 True",
        "all-reduce 4 4 3 True",
        "all-to-all 80 4 3 True",
        "collective-permute 80 4 3 True",
        "reduce-scatter 320 4 3 True",
    ]


# A loop of four passes, whose fusions take a row of an array and put one back.
LOOP = """\
HloModule jit_f, is_scheduled=true

%take (a: f32[10,8], i: s32[], b: f32[8]) -> f32[8] {
  %a = f32[10,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8]{0} parameter(2)
  %row = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  ROOT %sum = f32[8]{0} add(%flat, %b)
}

%put (c: f32[10,8], r: f32[1,8], j: s32[]) -> f32[10,8] {
  %c = f32[10,8]{1,0} parameter(0)
  %r = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %new = f32[10,8]{1,0} dynamic-update-slice(%c, %r, %j, %j)
}

%body (p: (s32[], f32[10,8], f32[8])) -> (s32[], f32[10,8], f32[8]) {
  %p = (s32[], f32[10,8]{1,0}, f32[8]{0}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %all = f32[10,8]{1,0} get-tuple-element(%p), index=1
  %old = f32[8]{0} get-tuple-element(%p), index=2
  %x = f32[8]{0} fusion(%all, %k, %old), kind=kLoop, calls=%take, metadata={op_name="jit(f)/take"}, backend_config={"estimated_cycles":"30"}
  %one = f32[1,8]{1,0} bitcast(%x)
  %y = f32[10,8]{1,0} fusion(%all, %one, %k), kind=kLoop, calls=%put
  ROOT %t = (s32[], f32[10,8]{1,0}, f32[8]{0}) tuple(%k, %y, %x)
}

%less (p.1: (s32[], f32[10,8], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[10,8]{1,0}, f32[8]{0}) parameter(0)
  %k.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(4)
  ROOT %c = pred[] compare(%k.1, %n), direction=LT
}

ENTRY %main (p0: (s32[], f32[10,8], f32[8])) -> f32[8] {
  %p0 = (s32[], f32[10,8]{1,0}, f32[8]{0}) parameter(0)
  %w = (s32[], f32[10,8]{1,0}, f32[8]{0}) while(%p0), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %last = f32[8]{0} get-tuple-element(%w), index=2
}
"""  # noqa: E501


def test_kernels_of_a_loop_are_counted_by_its_passes_and_slices_by_their_size():
    row = 4 * 8
    assert read_kernels(LOOP) == [
        Kernel("", "", "compare", 4 + 4 + 1, 0, 4),
        Kernel("jit(f)/take", "", "fusion", row + 4 + row + row, 30, 4),
        Kernel("", "", "fusion", 0 + row + 4 + row, 0, 4),
    ]


FLAT = """HloModule f, num_partitions=1

%part (a: f32[100]) -> f32[8] {
  %a = f32[100]{0} parameter(0)
  ROOT %s = f32[8]{0} slice(%a), slice={[8:16]}
}

ENTRY %main (p: f32[100]) -> f32[8] {
  %p = f32[100]{0} parameter(0)
  ROOT %x = f32[8]{0} fusion(%p), kind=kLoop, calls=%part
}
"""


def test_of_an_array_that_is_only_sliced_the_slice_is_read():
    assert [kernel.bytes for kernel in read_kernels(FLAT)] == [2 * 4 * 8]


ON_CHIP = """HloModule f, num_partitions=1

ENTRY %main (p: f32[100]) -> f32[8] {
  %p = f32[100]{0:T(128)} parameter(0)
  %c = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[100]{0:T(128)S(1)} copy-done(%c)
  %s = ((f32[100]{0:T(128)}), f32[8]{0:T(128)S(1)}, s32[]{:T(128)}) slice-start(%p)
  %e = f32[8]{0:T(128)S(1)} slice-done(%s)
  ROOT %x = f32[8]{0:T(128)} fusion(%d, %e), kind=kLoop, calls=%part
}

%part (a: f32[100], b: f32[8]) -> f32[8] {
  %a = f32[100]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %s = f32[8]{0} slice(%a), slice={[8:16]}
  ROOT %t = f32[8]{0} add(%s, %b)
}
"""


def test_what_a_tpu_keeps_on_the_chip_is_not_moved():
    """Once it is there."""
    moved = {kernel.operation: kernel.bytes for kernel in read_kernels(ON_CHIP)}
    counters = 4
    assert moved["copy-start"] == 4 * 100 + counters
    assert moved["slice-start"] == 4 * 8 + counters
    assert moved["fusion"] == 4 * 8


def test_the_installed_compilers_kernels_are_read():
    """A product reads two matrices and writes one, in a loop of three passes."""

    def f(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=3)[0]

    text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
    assert text is not None
    products = [k for k in read_kernels(text) if k.bytes >= 3 * 4 * 64 * 64]
    assert {k.times for k in products} == {3}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("def f(x):\n  return x\n")


def test_a_ring_sends():
    assert Collective("all-reduce", 80, 4).sent == 2 * 60
    assert Collective("all-gather", 80, 4, times=3).sent == 3 * 60
    assert Collective("reduce-scatter", 80, 4).sent == 60
    assert Collective("collective-permute", 80, 4).sent == 80
    assert Collective("all-reduce", 80, 1).sent == 0


PALLAS = """HloModule f, num_partitions=1

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %x = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"kernel_cycles":"444"
}}, metadata={op_name="jit(f)/attend"}, backend_config={"custom_call_config":{}}
  ROOT %y = f32[8]{0} copy(%x), frontend_attributes={kernel_metadata={
"kernel_cycles":"444"
}}, metadata={op_name="jit(f)/attend"}, backend_config={"estimated_cycles":"30"}
}
"""  # noqa: E501


def test_a_kernel_in_pallas_says_its_cycles_and_what_is_around_it_has_its_own():
    assert read_kernels(PALLAS) == [
        Kernel("jit(f)/attend", "", "custom-call", 2 * 4 * 8, 444, 1),
        Kernel("jit(f)/attend", "", "copy", 2 * 4 * 8, 30, 1),
    ]
