# SPDX-License-Identifier: Apache-2.0
"""How much people like an image, from its CLIP embedding.

LAION's predictors (improved-aesthetic-predictor, and the linear one before
it) are linear layers without activations, trained on ratings from 1 to 10.

Shapes: B images, P width of the embedding, I and O widths of a layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Kernel `[I, O]` and bias `[O]` of each layer.
Head = Sequence[tuple[jax.Array, jax.Array]]


def rate(head: Head, embedding_BP: jax.Array) -> jax.Array:
  """Marks of unit vectors, in fp32: `[B]`."""
  x = embedding_BP.astype(jnp.float32)
  for kernel_IO, bias_O in head:
    x = jnp.matmul(x, kernel_IO, precision="highest") + bias_O[None]
  return x[:, 0]
