# SPDX-License-Identifier: Apache-2.0
"""The GAN part of DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.3).

A discriminator looks at noisy images, real ones and those of the student. The
loss is the logistic one without saturation; a logit above 0 says "real".

Shapes: B batch.
"""

import jax
import jax.numpy as jnp


def discriminator_loss(real_B: jax.Array, fake_B: jax.Array) -> jax.Array:
  """`softplus(-real) + softplus(fake)` of logits, fp32 `[B]`."""
  return jax.nn.softplus(-real_B) + jax.nn.softplus(fake_B)


def generator_loss(fake_B: jax.Array) -> jax.Array:
  """`softplus(-fake)` of the logits of the student's samples, fp32 `[B]`."""
  return jax.nn.softplus(-fake_B)


def verdicts(real_B: jax.Array, fake_B: jax.Array) -> dict[str, jax.Array]:
  """Mean logits and shares that are judged right, for the log."""
  return {
    "d_real": real_B.mean(),
    "d_fake": fake_B.mean(),
    "d_real_accuracy": jnp.mean(real_B > 0),
    "d_fake_accuracy": jnp.mean(fake_B < 0),
  }
