# SPDX-License-Identifier: Apache-2.0
"""Attention on two streams without a full S x S array.

The prefix (text and reference images) attends to itself block-causally; the
target attends to [prefix, itself] with a validity mask only. Queries are
taken in chunks, and each chunk's scores are recomputed in the backward pass,
so the largest score buffer is `[B, H, CHUNK, M]` at any sequence length.

Shapes: q_BNHK, k_BMHK, v_BMHK.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Rows of queries whose scores exist at once; ours, not from the report.
CHUNK = 1024


def prefix_allowed(
  order_q: jax.Array, blocks_q: jax.Array, blocks: jax.Array, valid: jax.Array
) -> jax.Array:
  """Block-causal rule: earlier tokens, and the whole of one's own image.

  Args:
    order_q: `[n]` sequence index of each query row.
    blocks_q: `[B, n]` image id of each query row, -1 for text.
    blocks: `[B, P]` image id of each key, -1 for text.
    valid: `[B, P]` true where a key is not padding.

  Returns:
    bool `[B, n, P]`. A row always sees itself, so padding rows stay finite.
  """
  order_k = jnp.arange(blocks.shape[1])
  causal = (order_q[:, None] >= order_k[None, :])[None]
  q, k = blocks_q[:, :, None], blocks[:, None, :]
  allowed = (causal | ((q == k) & (q >= 0))) & valid[:, None, :]
  return allowed | (order_q[:, None] == order_k[None, :])[None]


def _attend(q_BNHK, k_BMHK, v_BMHK, allowed_BNM):
  """Softmax attention with fp32 scores; `allowed_BNM` broadcasts over N."""
  scale = q_BNHK.shape[-1] ** -0.5
  scores = jnp.einsum(
    "bnhk,bmhk->bhnm", q_BNHK, k_BMHK, preferred_element_type=jnp.float32
  )
  scores = jnp.where(allowed_BNM[:, None], scores * scale, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BMHK.dtype)
  return jnp.einsum("bhnm,bmhk->bnhk", weights, v_BMHK)


def _by_chunks(attend: Callable, n: int, rows: tuple):
  """Maps `attend(*rows_chunk)` over chunks of axis 1 when n > CHUNK."""
  if n <= CHUNK:
    return attend(*rows)
  count = -(-n // CHUNK)

  def split(x):
    pad = [(0, 0), (0, count * CHUNK - n)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], count, CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  out = jax.lax.map(
    lambda chunk: jax.checkpoint(attend)(*chunk), jax.tree.map(split, rows)
  )
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], count * CHUNK, *out.shape[3:])[:, :n]


def prefix_attention(q_BPHK, k_BPHK, v_BPHK, blocks_BP, valid_BP):
  """Block-causal self-attention of the prefix: `[B, P, H, K]`."""
  batch, length = blocks_BP.shape
  order = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))

  def attend(q, order_q, blocks_q):
    allowed = prefix_allowed(order_q[0], blocks_q, blocks_BP, valid_BP)
    return _attend(q, k_BPHK, v_BPHK, allowed)

  return _by_chunks(attend, length, (q_BPHK, order, blocks_BP))


def full_attention(q_BNHK, k_BMHK, v_BMHK, valid_BM):
  """Every query sees every valid key: `[B, N, H, K]`."""

  def attend(q):
    return _attend(q, k_BMHK, v_BMHK, valid_BM[:, None, :])

  return _by_chunks(attend, q_BNHK.shape[1], (q_BNHK,))
