# SPDX-License-Identifier: Apache-2.0
"""The one conditioning struct that every stage and the sampler share.

Shapes: B batch, T encoder tokens, R reference latents (all images of a
sample, row-major, one after the other), P prefix tokens, N target tokens,
C encoder width, Z latent channels.
"""

import flax.struct
import jax


@flax.struct.dataclass
class Layout:
  """Where each token of the joint sequence comes from and where it sits.

  Built on the host per sample from the true text length, so padding never
  moves a position.

  Attributes:
    source_BP: int32, index of each prefix token into [T text states, R
      reference latents]; padding repeats index 0.
    blocks_BP: int32, -1 for text, otherwise the number of the image.
    valid_BP: bool, false on padding.
    positions_BP3: int32 (frame, row, column) of each prefix token.
    target_positions_BN3: int32 (frame, row, column) of each target token.
  """

  source_BP: jax.Array
  blocks_BP: jax.Array
  valid_BP: jax.Array
  positions_BP3: jax.Array
  target_positions_BN3: jax.Array


@flax.struct.dataclass
class Conditioning:
  """Everything the MMDiT is told about one batch.

  Attributes:
    text_BTC: encoder states before the final norm.
    references_BRZ: normalised latents of the reference images (R may be 0).
    layout: token sources, blocks, validity and positions.
  """

  text_BTC: jax.Array
  references_BRZ: jax.Array
  layout: Layout
