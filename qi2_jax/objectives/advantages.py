# SPDX-License-Identifier: Apache-2.0
"""From rewards to advantages: every image against those of its prompt.

    A = sum_r w_r (reward_r - mean_r) / std_r

The mean is that of the group, the images of one prompt; so is the std, or it
is that of the whole batch (Flow-GRPO's default). A reward is divided by its
own std before the weights apply, so that its unit does not matter
(Qwen-Image-2.0-RL, arXiv 2606.27608, as reviews of it report).

Shapes: R rewards, G groups (prompts), K images of a group.
"""

import jax
import jax.numpy as jnp

SCALES = ("group", "batch")

# Spread below this times the largest reward is rounding.
_ROUNDING = 1e-6


def _moments(x, valid, axes):
  """Mean and standard deviation over `axes` of what is valid, kept as 1."""
  count = jnp.maximum(jnp.sum(valid, axis=axes, keepdims=True), 1)
  mean = jnp.sum(jnp.where(valid, x, 0.0), axis=axes, keepdims=True) / count
  square = jnp.where(valid, jnp.square(x - mean), 0.0)
  return mean, jnp.sqrt(jnp.sum(square, axis=axes, keepdims=True) / count)


def standardised(
  rewards_RGK: jax.Array, valid_GK: jax.Array, scale: str = "group"
) -> jax.Array:
  """Every reward centred in its group and divided by a standard deviation.

  Args:
    rewards_RGK: any units; what is not valid may be anything, NaN included.
    valid_GK: False where a reward is missing.
    scale: std of the `group` or of the whole `batch`.

  Returns:
    `[R, G, K]`; 0 where a group does not vary, and where not valid.
  """
  valid = valid_GK[None]
  rewards = jnp.where(valid, rewards_RGK, 0.0)
  mean, spread = _moments(rewards, valid, (2,))
  size = jnp.max(jnp.abs(rewards), axis=2, keepdims=True)
  varies = spread > _ROUNDING * size
  if scale == "batch":
    _, spread = _moments(rewards, valid, (1, 2))
  z = (rewards - mean) / jnp.where(varies, spread, 1.0)
  return jnp.where(varies & valid, z, 0.0)


def advantages(
  rewards_RGK: jax.Array, weights_RG: jax.Array, valid_GK: jax.Array, *,
  scale: str = "group", clip: float = 5.0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Advantages and which groups teach anything.

  Args:
    rewards_RGK: see `standardised`.
    weights_RG: of every reward in every group; a category may have its own.
    valid_GK: False where a reward is missing; such images are left out.
    scale: see `standardised`.
    clip: bound of the advantages.

  Returns:
    `(advantages [G, K], kept [G])`: a group is kept if a reward of weight
    varies in it.
  """
  z = standardised(rewards_RGK, valid_GK, scale)
  total = jnp.einsum("rgk,rg->gk", z, jnp.asarray(weights_RG, z.dtype))
  kept_G = jnp.any(total != 0.0, axis=1)
  return jnp.clip(total, -clip, clip), kept_G


def row_weights(kept_G: jax.Array, valid_GK: jax.Array) -> jax.Array:
  """Weights of the images in a mean over the batch, `[G, K]`.

  0 for dropped groups and missing rewards; their mean is 1, so that the plain
  mean of a weighted loss is the mean over what counts, microbatches included.
  """
  counts = (valid_GK & kept_G[:, None]).astype(jnp.float32)
  return counts / jnp.maximum(jnp.mean(counts), 1e-9)
