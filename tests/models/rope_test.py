# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: a rotation by exact angles, relative in position."""

import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.models import rope

AXES, THETA = (16, 56, 56), 10000.0


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def positions(*rows):
  return jnp.asarray(rows, jnp.int32)[None]


def test_angles_are_positions_times_geometric_frequencies():
  at = positions((0, 0, 0), (7, -3, 5), (9300, 20000, -1500))
  ours = np.asarray(rope.angles(at, AXES, THETA))[0]
  start = 0
  for axis, dim in enumerate(AXES):
    freqs = THETA ** (-np.arange(0, dim, 2) / dim)
    exact = np.asarray(at)[0, :, axis, None] * freqs
    part = ours[:, start : start + dim // 2]
    np.testing.assert_allclose(part, exact, rtol=1e-6, atol=1e-6)
    start += dim // 2
  assert start == ours.shape[-1]


def test_no_position_aliases_another():
  """diffusers' table wraps at 8192; ours has none."""
  at = positions((8191, 0, 0), (8192, 0, 0), (-1024, 0, 0), (9216, 0, 0))
  turns = np.exp(1j * np.asarray(rope.angles(at, AXES, THETA)[0, :, :8]))
  for i in range(4):
    for j in range(i):
      assert np.abs(turns[i] - turns[j]).max() > 1e-3


def test_rotation_is_complex_multiplication_of_adjacent_pairs():
  x = normal(2, 5, 3, 8)
  angles = normal(2, 5, 4, seed=1)
  pairs = np.asarray(x).reshape(2, 5, 3, 4, 2)
  turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(
    1j * np.asarray(angles)
  )[:, :, None]
  expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
  np.testing.assert_allclose(rope.rotate(x, angles), expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scores_depend_on_the_offset_alone(axis):
  q, k = normal(1, 1, 1, 128), normal(1, 1, 1, 128, seed=1)

  def score(first, second):
    a, b = np.zeros((2, 3), np.int32)
    a[axis], b[axis] = first, second
    turn = lambda x, p: rope.rotate(  # noqa: E731
      x, rope.angles(positions(tuple(p)), AXES, THETA)
    )
    return float((turn(q, a) * turn(k, b)).sum())

  assert score(5, 2) == pytest.approx(score(45, 42), abs=1e-3)
  assert score(-3, 1) == pytest.approx(score(60, 64), abs=1e-3)
  assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_compute_dtype_is_kept_and_math_is_fp32():
  x, angles = normal(1, 4, 2, 8), normal(1, 4, 4, seed=1)
  out = rope.rotate(x.astype(jnp.bfloat16), angles)
  assert out.dtype == jnp.bfloat16
  exact = rope.rotate(x.astype(jnp.bfloat16).astype(jnp.float32), angles)
  np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
