# SPDX-License-Identifier: Apache-2.0
"""Three-axis rotary position embedding (MSRoPE), adjacent pairs, fp32.

Angles are computed from integer positions, never looked up, so no position
aliases (diffusers' table wraps at 8192; ours has no table).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def angles(
  positions_BN3: jax.Array, axes: Sequence[int], theta: float
) -> jax.Array:
  """Rotation angles of every token.

  Args:
    positions_BN3: integer (frame, row, column) per token.
    axes: even head channels given to each axis; their sum is the head size.
    theta: base of the geometric frequencies.

  Returns:
    fp32 `[B, N, K/2]`, frame | row | column.
  """
  parts = []
  for axis, dim in enumerate(axes):
    # fp32 throughout, as in the public model, so that angles agree at large
    # positions too.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freqs = np.float32(1.0) / np.power(np.float32(theta), exponent)
    freqs = jnp.asarray(freqs)[None, None, :]
    parts.append(positions_BN3[..., axis, None].astype(jnp.float32) * freqs)
  return jnp.concatenate(parts, axis=-1)


def rotate(x_BNHK: jax.Array, angles_BNk: jax.Array) -> jax.Array:
  """Rotates adjacent channel pairs by `angles` (k = K/2), in fp32."""
  cos = jnp.cos(angles_BNk)[:, :, None, :]
  sin = jnp.sin(angles_BNk)[:, :, None, :]
  x = x_BNHK.astype(jnp.float32).reshape(*x_BNHK.shape[:-1], -1, 2)
  even, odd = x[..., 0], x[..., 1]
  out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return out.reshape(x_BNHK.shape).astype(x_BNHK.dtype)
