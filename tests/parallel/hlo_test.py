# SPDX-License-Identifier: Apache-2.0
"""Reading HLO: counts that are known beforehand, and the forms of TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.parallel import hlo, hlo_costs
from qi2_jax.parallel.mesh import create_mesh


def compiled(function, *shapes):
  """The parsed program of `function` on fp32 arrays of these shapes."""
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def test_products_of_nested_scans_count_every_turn():
  def inner(x, w):
    return x @ w, None

  def outer(x, stack):
    return jax.lax.scan(inner, x, stack)

  def function(x, stacks):
    return jax.lax.scan(outer, x, stacks)[0]

  module = compiled(function, (16, 32), (5, 7, 32, 32))
  found = hlo_costs.products(module)
  assert found.flops == 2 * 16 * 32 * 32 * 5 * 7
  assert found.bytes == 4 * (2 * 16 * 32 + 32 * 32) * 5 * 7
  assert module.unknown_loops == ()


def test_batched_product():
  module = compiled(
    lambda a, b: jnp.einsum("bnhk,bmhk->bhnm", a, b), (2, 8, 3, 16),
    (2, 4, 3, 16),
  )  # fmt: skip
  assert hlo_costs.products(module).flops == 2 * 2 * 3 * 8 * 4 * 16


def test_convolution_counts_only_positions_inside():
  def function(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  module = compiled(function, (2, 6, 6, 16), (3, 3, 16, 8))
  # Per axis 3 taps at 6 places, less one at either edge.
  assert hlo_costs.products(module).flops == 2 * 2 * 16 * 8 * (3 * 6 - 2) ** 2


@functools.cache
def _mesh():
  return create_mesh({"fsdp": 8})


@pytest.mark.parametrize(
  "kind, collective, size",
  [
    ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp"), 8 * 4 * 4 * 6),
    ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 4 * 4 * 6),
    ("reduce-scatter",
     lambda x: jax.lax.psum_scatter(x.reshape(8, 3), "fsdp"), 4 * 4 * 6),
    ("collective-permute",
     lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), 4 * 4 * 6),
  ],
)  # fmt: skip
def test_collectives_in_a_loop(kind, collective, size):
  def body(x):
    def turn(carry, i):
      out = collective(carry + i)
      return carry + out.sum(), out.sum()

    return jax.lax.scan(turn, x, jnp.arange(3.0))[1]

  mapped = jax.shard_map(
    body, mesh=_mesh(), in_specs=jax.P("fsdp"), out_specs=jax.P(),
    check_vma=False,
  )  # fmt: skip
  found = hlo_costs.collectives(compiled(mapped, (32, 6)))
  assert found == {kind: {"count": 3, "bytes": 3.0 * size}}


def test_scattered_gradients_of_the_compiler_are_seen():
  """Sharded parameters: gathered once, their gradients reduced."""
  mesh = _mesh()
  place = lambda *names: jax.NamedSharding(mesh, jax.P(*names))  # noqa: E731
  w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("fsdp"))
  x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place("fsdp"))
  grad = jax.jit(
    jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)),
    out_shardings=place("fsdp"),
  )
  found = hlo_costs.collectives(hlo.parse(grad.lower(w, x).compile().as_text()))
  size = 64 * 32 * 4
  assert found["all-gather"]["bytes"] == size
  reduced = {k: found[k]["bytes"] for k in found if "reduce" in k}
  assert list(reduced.values()) == [size]


FLASH = """
ENTRY %main (q: bf16[4,8,256,128]) -> bf16[4,8,256,128] {
  %m = s8[1,1,2]{2,1,0} parameter(0)
  %q = bf16[QUERIES]{3,2,1,0} parameter(1)
  %k = bf16[KEYS]{3,2,1,0} parameter(2)
  %s = s32[4,8,1536]{2,1,0} parameter(3)
  ROOT %splash_mha_PHASE_segmented.4 = (f32[4,256,128]{2,1,0}, bf16[QUERIES]{3,2,1,0}) custom-call(%m, %q, %k, %k, %s), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


@pytest.mark.parametrize("batch", ["4,", ""])
def test_flash_kernels_count_their_products(batch):
  """QK and PV forward; scores again and two or three more backward."""
  for phase, products in {"fwd": 2, "dq": 3, "dkv": 4}.items():
    text = FLASH.replace("PHASE", phase)
    text = text.replace("QUERIES", batch + "8,256,128")
    text = text.replace("KEYS", batch + "8,384,128")
    found = hlo_costs.products(hlo.parse(text))
    rows = (4 if batch else 1) * 8
    assert found.flops == products * 2 * rows * 256 * 384 * 128


def test_largest_buffers_are_stored_ones():
  kept = hlo_costs.largest_buffers(compiled(lambda x: x @ x.T, (48, 8)), 2)
  assert [str(a) for a in kept] == ["f32[48,48]", "f32[48,8]"]
  # Inside its kernel the outer product is never stored.
  text = """HloModule a

%sum (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %left = f32[64,64]{1,0} broadcast(%x), dimensions={0}
  ROOT %row = f32[64]{0} custom-call(%left), custom_call_target="sum"
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x.1 = f32[64]{0} parameter(0)
  ROOT %out = f32[64]{0} fusion(%x.1), kind=kLoop, calls=%sum
}
"""
  assert [str(a) for a in hlo_costs.largest_buffers(hlo.parse(text))] == [
    "f32[64]"
  ]


# What libtpu writes for a batched product, a loop without an annotation, a
# gather by zero-padded sums, a true sum, and a fused scatter.
TPU = """HloModule a, is_scheduled=true

%padded (p: bf16[4096,128], q: bf16[64,128]) -> bf16[4096,128] {
  %p = bf16[4096,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[4096,128]{1,0} dynamic-update-slice(%p, %q, %z, %z)
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[1,8] {
  %p.1 = f32[64,8]{1,0} parameter(0)
  %sum = f32[64,8]{1,0} all-reduce(%p.1), to_apply=%add
  %z.1 = s32[] constant(0)
  ROOT %ds = f32[1,8]{1,0} dynamic-slice(%sum, %z.1, %z.1)
}

%scores (a: bf16[4,512,32,128], b: bf16[4,512,32,128]) -> f32[4,32,512,512] {
  %a = bf16[4,512,32,128]{1,3,2,0} parameter(0)
  %b = bf16[4,512,32,128]{1,3,2,0} parameter(1)
  ROOT %conv = f32[4,32,512,512]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=4x32 stride=4x32 pad=3_3x31_31 lhs_dilate=3x31 rhs_reversal=1x1}, dim_labels=0b1f_0o1i->01fb
}

%condition (c: (s32[], f32[64,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %c = (s32[]{:T(128)}, f32[64,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (c: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %c.1 = (s32[]{:T(128)}, /*index=1*/f32[64,8]{1,0}) parameter(0)
  %x = f32[64,8]{1,0} get-tuple-element(%c.1), index=1
  %empty = bf16[4096,128]{1,0} broadcast(%x), dimensions={}
  %shard = bf16[64,128]{1,0} custom-call(%x), custom_call_target="s"
  %full = bf16[4096,128]{1,0} fusion(%empty, %shard), kind=kLoop, calls=%padded
  %grad = bf16[8,128]{1,0} custom-call(%x), custom_call_target="g"
  %both = (bf16[4096,128]{1,0}, bf16[8,128]{1,0}) all-reduce(%full, %grad), to_apply=%add
  %part = f32[1,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %q.1 = bf16[4,512,32,128]{1,3,2,0} custom-call(%x), custom_call_target="q"
  %s = f32[4,32,512,512]{2,3,1,0} fusion(%q.1, %q.1), kind=kOutput, calls=%scores
  ROOT %t = (s32[], f32[64,8]{1,0}) custom-call(%s), custom_call_target="t"
}

ENTRY %main (x: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %x.1 = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[64,8]{1,0}) while(%x.1), condition=%condition, body=%body
}
"""  # noqa: E501


def test_programs_for_tpus():
  module = hlo.parse(TPU)
  assert module.unknown_loops == ()
  flops = hlo_costs.products(module).flops
  assert flops == 32 * 2 * 4 * 32 * 512 * 512 * 128
  assert hlo_costs.collectives(module) == {
    hlo_costs.PADDED_GATHER: {"count": 32, "bytes": 32.0 * 4096 * 128 * 2},
    "all-reduce": {"count": 32, "bytes": 32.0 * 8 * 128 * 2},
    "reduce-scatter": {"count": 32, "bytes": 32.0 * 64 * 8 * 4},
  }
  assert str(hlo_costs.largest_buffers(module)[0]) == "f32[4,32,512,512]"


def test_a_loop_of_unknown_length_is_named_and_counts_once():
  module = hlo.parse(TPU.replace("direction=LT", "direction=NE"))
  assert module.unknown_loops == ("w",)
  assert hlo_costs.products(module).flops == 2 * 4 * 32 * 512 * 512 * 128


def test_sizes_of_types():
  sizes = {
    "f32": 4, "bf16": 2, "s8": 1, "pred": 1, "u64": 8, "f8e4m3fn": 1, "c64": 8,
  }  # fmt: skip
  found = {name: hlo.Array(name, (3,)).bytes / 3 for name in sizes}
  np.testing.assert_equal(found, sizes)
