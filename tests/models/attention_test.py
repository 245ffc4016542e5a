# SPDX-License-Identifier: Apache-2.0
"""Attention against other libraries, its mask, and its chunks."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.models import attention

# Two texts around two images that touch, then padding.
BLOCKS = np.array([[-1, -1, 0, 0, 0, 0, 1, 1, -1, -1, -1, -1, -1],
                   [-1, 0, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1, -1]])  # fmt: skip
VALID = np.arange(13)[None] < np.array([[13], [10]])


def allowed_pairs(blocks, valid):
  """The written rule, one pair at a time."""
  n = len(blocks)
  out = np.zeros((n, n), bool)
  for q in range(n):
    for k in range(n):
      same = blocks[q] == blocks[k] and blocks[q] >= 0
      out[q, k] = (valid[k] and (q >= k or same)) or q == k
  return out


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


@pytest.fixture
def qkv():
  return tuple(normal(2, 13, 2, 8, seed=i) for i in range(3))


MASK = np.stack([allowed_pairs(b, v) for b, v in zip(BLOCKS, VALID)])


def prefix(q, k, v):
  return attention.prefix_attention(
    q, k, v, jnp.asarray(BLOCKS), jnp.asarray(VALID)
  )


def full(q, k, v):
  return attention.full_attention(q, k, v, jnp.asarray(VALID))


def test_the_mask_is_the_written_rule():
  ours = attention.prefix_allowed(
    jnp.arange(13), jnp.asarray(BLOCKS), jnp.asarray(BLOCKS),
    jnp.asarray(VALID),
  )  # fmt: skip
  np.testing.assert_array_equal(ours, MASK)


def masks():
  every = np.broadcast_to(VALID[:, None, :], MASK.shape)
  return {"prefix": (prefix, MASK), "full": (full, every)}


@pytest.mark.parametrize("name", ["prefix", "full"])
def test_attention_equals_jax_nn(name, qkv):
  attend, mask = masks()[name]
  theirs = jax.nn.dot_product_attention(*qkv, mask=jnp.asarray(mask[:, None]))
  np.testing.assert_allclose(attend(*qkv), theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix", "full"])
def test_attention_equals_torch(name, qkv):
  torch = pytest.importorskip("torch")
  attend, mask = masks()[name]
  heads_first = [torch.tensor(np.asarray(t)).transpose(1, 2) for t in qkv]
  theirs = torch.nn.functional.scaled_dot_product_attention(
    *heads_first, attn_mask=torch.tensor(mask.copy())[:, None]
  )
  np.testing.assert_allclose(
    attend(*qkv), theirs.transpose(1, 2).numpy(), atol=1e-5
  )


@pytest.mark.parametrize("chunk", [1, 5, 12])
@pytest.mark.parametrize("name", ["prefix", "full"])
def test_chunks_change_nothing(name, chunk, qkv, monkeypatch):
  attend, _ = masks()[name]
  weights = normal(2, 13, 2, 8, seed=9)

  def value_and_grads():
    # A new function each time: the chunk is read while tracing.
    loss = lambda *t: (attend(*t) * weights).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
    return attend(*qkv), *grads

  expected = value_and_grads()
  monkeypatch.setattr(attention, "CHUNK", chunk)
  for ours, theirs in zip(value_and_grads(), expected):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_chunks_bound_the_score_buffer(monkeypatch):
  """The largest buffer is [B, H, CHUNK, M], in the backward pass too."""
  monkeypatch.setattr(attention, "CHUNK", 16)
  q, k, v = (jnp.zeros((1, 256, 2, 8)),) * 3
  valid = jnp.ones((1, 256), bool)
  loss = lambda q: attention.full_attention(q, k, v, valid).sum()  # noqa: E731
  program = jax.jit(jax.grad(loss)).lower(q).compile().as_text()
  shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", program)
  sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
  assert 2 * 16 * 256 in sizes
  assert max(sizes) <= 2 * 16 * 256


def test_padding_rows_stay_finite(qkv):
  nothing = jnp.zeros((2, 13), bool)
  out, grads = jax.value_and_grad(
    lambda q: attention.prefix_attention(
      q, *qkv[1:], jnp.asarray(BLOCKS), nothing
    ).sum()
  )(qkv[0])
  assert np.isfinite(out) and np.isfinite(grads).all()


def test_scores_are_fp32_under_bf16():
  """Scores that differ by less than one bf16 ulp still rank."""
  q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
  k = jnp.full((1, 2, 1, 4), 16.0, jnp.bfloat16).at[0, 1, 0, 0].set(16.125)
  v = jnp.asarray([[[[0.0]], [[1.0]]]], jnp.bfloat16)
  v = jnp.broadcast_to(v, (1, 2, 1, 4))
  out = attention.full_attention(q, k, v, jnp.ones((1, 2), bool))
  exact = jax.nn.sigmoid(16.0 * 0.125 / 2)
  np.testing.assert_allclose(
    np.asarray(out, np.float32), np.full(out.shape, exact), rtol=1e-2
  )
