# SPDX-License-Identifier: Apache-2.0
"""The attention of the MMDiT by backend: XLA, TPU splash, GPU cuDNN.

Every kernel computes the same two things: the target sees the valid prefix
and itself; the prefix sees itself block-causally. None of them builds an
S x S array.

  xla     chunks of queries (`attention`); anywhere
  splash  JAX's Pallas flash kernel for TPUs; heads of 128 channels
  cudnn   flash attention of cuDNN through JAX; bf16 on NVIDIA GPUs

A prefix with images has a mask that differs from row to row and that neither
fused kernel offers, so that part always runs on `xla`; it is absent in T2I.

Shapes: q_BNHK queries of the target, k_BMHK and v_BMHK keys and values of
[prefix, target], M = P + N; q_BPHK, k_BPHK, v_BPHK of the prefix alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from qi2_jax.models import attention
from qi2_jax.parallel.sharding import activation_spec

KERNELS = ("xla", "splash", "cudnn")
# Name under which a rematerialisation policy finds what attention has made.
SAVED = "attention"
# Tiles of the splash kernel: the largest multiple of 128 up to _TILE that pads
# a sequence by at most 1 / _WASTE of it. Ours; not tuned on a TPU.
_TILE, _LANES, _WASTE = 1024, 128, 8


def best_kernel(platform: str, head_dim: int, dtype) -> str:
  """The fastest kernel that a backend offers for a model.

  Args:
    platform: of the devices: cpu, gpu, cuda or tpu.
    head_dim: channels of a head.
    dtype: compute dtype.
  """
  if platform == "tpu" and head_dim % _LANES == 0:
    return "splash"
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  # cuDNN's backward pass takes heads of up to 128 channels, multiples of 8.
  if platform in ("gpu", "cuda") and half and head_dim in range(8, 129, 8):
    return "cudnn"
  return "xla"


def target_attention(kernel: str, q_BNHK, k_BMHK, v_BMHK, valid_BP):
  """Every query sees every valid key of the prefix and the whole target.

  Args:
    kernel: one of `KERNELS`.
    q_BNHK: queries, of the target or (joint attention) of all M tokens.
    k_BMHK: keys, the P of the prefix first.
    v_BMHK: values likewise.
    valid_BP: true where a token of the prefix is not padding.

  Returns:
    `[B, N, H, K]` in the dtype of the values.
  """
  batch, prefix = valid_BP.shape
  own = k_BMHK.shape[1] - prefix
  if kernel == "cudnn":
    # cuDNN masks the end of the keys, so the padding has to lie there.
    last = functools.partial(jnp.roll, shift=own, axis=1)
    seen = own + valid_BP.sum(axis=1, dtype=jnp.int32)
    return _cudnn(q_BNHK, last(k_BMHK), last(v_BMHK), seen, causal=False)
  rest = jnp.ones((batch, own), bool)
  valid_BM = jnp.concatenate([valid_BP, rest], axis=1)
  if kernel == "splash":
    return _on_mesh(_splash_full, q_BNHK, k_BMHK, v_BMHK, valid_BM)
  return attention.full_attention(q_BNHK, k_BMHK, v_BMHK, valid_BM)


def prefix_attention(kernel: str, q_BPHK, k_BPHK, v_BPHK, blocks_BP, valid_BP):
  """Block-causal self-attention of the prefix: `[B, P, H, K]`.

  Rows of padding hold finite numbers that depend on the kernel.

  Args:
    kernel: one of `KERNELS`.
    q_BPHK: queries.
    k_BPHK: keys.
    v_BPHK: values.
    blocks_BP: image of each token, -1 for text; None: there are no images.
    valid_BP: true where a token is not padding; padding is at the end.
  """
  if blocks_BP is None and kernel == "splash":
    return _on_mesh(_splash_causal, q_BPHK, k_BPHK, v_BPHK, valid_BP)
  if blocks_BP is None and kernel == "cudnn":
    seen = valid_BP.sum(axis=1, dtype=jnp.int32)
    return _cudnn(q_BPHK, k_BPHK, v_BPHK, seen, causal=True)
  if blocks_BP is None:
    blocks_BP = jnp.full(valid_BP.shape, -1)
  return attention.prefix_attention(q_BPHK, k_BPHK, v_BPHK, blocks_BP, valid_BP)


def _on_mesh(attend, q_BNHK, k_BMHK, v_BMHK, valid_BM):
  """Runs a Pallas kernel shard by shard: the partitioner cannot split it."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return attend(q_BNHK, k_BMHK, v_BMHK, valid_BM)
  heads = ("batch", None, "attention_heads", None)
  specs = [activation_spec(x.shape, heads, mesh) for x in (q_BNHK, k_BMHK)]
  rows = activation_spec(valid_BM.shape, ("batch", None), mesh)
  return jax.shard_map(
    attend, in_specs=(specs[0], specs[1], specs[1], rows), out_specs=specs[0],
    check_vma=False,
  )(q_BNHK, k_BMHK, v_BMHK, valid_BM)  # fmt: skip


def tile(length: int) -> int:
  """Rows of a splash tile for a sequence of `length`; it is padded to them."""
  for size in range(_TILE, _LANES, -_LANES):
    if -length % size <= length / _WASTE:
      return size
  return _LANES


def _pad(x, size: int):
  """Zeros behind axis 1 up to a multiple of `size`."""
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))


def _splash(mask_class, q_BNHK, k_BMHK, v_BMHK, valid_BM):
  length, dtype = q_BNHK.shape[1], q_BNHK.dtype
  tile_q, tile_k = tile(length), tile(k_BMHK.shape[1])
  q = (q_BNHK.astype(jnp.float32) * q_BNHK.shape[-1] ** -0.5).astype(dtype)
  q, k, v = _pad(q, tile_q), _pad(k_BMHK, tile_k), _pad(v_BMHK, tile_k)
  # Tokens see those of their own segment: queries are 1, padding is 0.
  segments = splash.SegmentIds(
    q=jnp.ones(q.shape[:2], jnp.int32),
    kv=_pad(valid_BM, tile_k).astype(jnp.int32),
  )
  mask = mask_class((q.shape[1], k.shape[1]))
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * q.shape[2]), head_shards=1, q_seq_shards=1,
    block_sizes=splash.BlockSizes(
      block_q=tile_q, block_kv=tile_k, block_q_dkv=tile_q,
      block_kv_dkv=tile_k, block_q_dq=tile_q, block_kv_dq=tile_k,
    ),
    residual_checkpoint_name=SAVED,
  )  # fmt: skip
  heads_first = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
  out = jax.vmap(attend)(*heads_first, segments)
  return jnp.moveaxis(out, 1, 2)[:, :length].astype(dtype)


_splash_full = functools.partial(_splash, splash.FullMask)
_splash_causal = functools.partial(_splash, splash.CausalMask)


def _cudnn(q_BNHK, k_BMHK, v_BMHK, seen_B, causal: bool):
  """cuDNN's flash attention over the first `seen_B` keys of each row."""
  return jax.nn.dot_product_attention(
    q_BNHK, k_BMHK, v_BMHK, is_causal=causal, key_value_seq_lengths=seen_B,
    implementation="cudnn",
  )  # fmt: skip
