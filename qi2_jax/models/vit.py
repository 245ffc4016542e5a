# SPDX-License-Identifier: Apache-2.0
"""What plain transformer encoders share: DINOv2, CLIP and SigLIP.

The functions make their submodules in the module that calls them, so that
each model keeps the parameter tree that its checkpoint suggests.

Shapes: B batch, H, W pixels, h, w patches along an axis, N tokens, T text
tokens, D width.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.errors import InputError
from qi2_jax.models import layers
from qi2_jax.parallel.sharding import constrain


def quick_gelu(x: jax.Array) -> jax.Array:
  """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
  return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
  """GELU by the error function."""
  return nn.gelu(x, approximate=False)


# By the names that published configs give them.
ACTIVATIONS: dict[str, Callable] = {
  "quick_gelu": quick_gelu,
  "gelu": exact_gelu,
  "gelu_pytorch_tanh": nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """Shape of a stack of pre-norm blocks.

  Attributes:
    num_layers: blocks; they are scanned.
    width: channels of a token.
    num_heads: attention heads.
    mlp_width: hidden width of a block's MLP.
    activation: of the MLP; a name in `ACTIVATIONS`.
    eps: epsilon of the norms.
    dtype: compute dtype.
  """

  num_layers: int
  width: int
  num_heads: int
  mlp_width: int
  activation: str
  eps: float
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    """Raises InputError for what no stack can be."""
    if self.width % self.num_heads:
      raise InputError(
        f"a width of {self.width} is no multiple of {self.num_heads} attention "
        "heads; check the model's config.json."
      )
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f"the activation {self.activation!r} is unknown; only "
        f"{sorted(ACTIVATIONS)} are."
      )


def self_attention(
  x_BND: jax.Array, num_heads: int, dtype: jnp.dtype, causal: bool = False
) -> jax.Array:
  """Self-attention with biases: `[B, N, D]`.

  The score array is whole: a thousand tokens do not need chunks of queries.

  Args:
    x_BND: normed tokens.
    num_heads: that divide D.
    dtype: compute dtype.
    causal: whether a token sees only itself and earlier ones.
  """
  width = x_BND.shape[-1]
  heads = (num_heads, width // num_heads)
  q, k, v = (
    constrain(
      nn.DenseGeneral(heads, dtype=dtype, name=name)(x_BND),
      "batch", None, "heads", None,
    )
    for name in ("to_q", "to_k", "to_v")
  )  # fmt: skip
  out = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
  return nn.DenseGeneral(width, axis=(-2, -1), dtype=dtype, name="to_out")(out)


def mlp(
  x_BND: jax.Array, width: int, activation: Callable, dtype: jnp.dtype
) -> jax.Array:
  """Two linear layers with `activation` between: `[B, N, D]`."""
  h = nn.Dense(width, dtype=dtype, name="fc1")(x_BND)
  h = activation(constrain(h, "batch", None, "mlp"))
  return nn.Dense(x_BND.shape[-1], dtype=dtype, name="fc2")(h)


class Block(nn.Module):
  """One pre-norm block."""

  config: StackConfig
  causal: bool

  @nn.compact
  def __call__(self, x_BND, _):
    """Runs the block; shaped for `nn.scan`."""
    cfg = self.config
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm1")(x_BND)
    x_BND = x_BND + self_attention(h, cfg.num_heads, cfg.dtype, self.causal)
    h = layers.affine_norm(cfg.eps, cfg.dtype, "norm2")(x_BND)
    h = mlp(h, cfg.mlp_width, ACTIVATIONS[cfg.activation], cfg.dtype)
    return constrain(x_BND + h, "batch", None, None), None


def stack(
  config: StackConfig, x_BND: jax.Array, causal: bool = False
) -> jax.Array:
  """All blocks: `[B, N, D]`."""
  blocks = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=config.num_layers,
  )(config, causal, name="blocks")
  x_BND, _ = blocks(constrain(x_BND, "batch", None, None), None)
  return x_BND


def square_patches(
  image_BHWC: jax.Array, side: int, patch: int, width: int, dtype: jnp.dtype,
  bias: bool,
) -> jax.Array:  # fmt: skip
  """Patches of square images as tokens, row by row: `[B, h * w, D]`.

  Pixels beyond the last whole patch are left out, as in a convolution
  without padding (384 px hold 27 patches of 14).

  Args:
    image_BHWC: normalised RGB.
    side: pixels along an image.
    patch: pixels along a patch.
    width: D.
    dtype: compute dtype.
    bias: whether the projection has one.

  Raises:
    InputError: the images are of another shape.
  """
  if image_BHWC.shape[1:] != (side, side, 3):
    raise InputError(
      f"images of shape {image_BHWC.shape[1:]} do not fit a model for RGB of "
      f"{side} x {side} px; prepare them with the folder's own processor."
    )
  x = nn.Conv(
    width, (patch, patch), strides=(patch, patch), padding="VALID",
    use_bias=bias, dtype=dtype, name="patch_embed",
  )(image_BHWC.astype(dtype))  # fmt: skip
  return x.reshape(x.shape[0], -1, width)


def token_embedding(
  ids_BT: jax.Array, vocabulary: int, length: int, width: int,
  dtype: jnp.dtype,
) -> jax.Array:  # fmt: skip
  """Tokens with learned positions: `[B, T, D]`.

  Args:
    ids_BT: token ids, T at most `length`.
    vocabulary: number of tokens.
    length: number of positions.
    width: D.
    dtype: compute dtype.

  Raises:
    InputError: the texts are too long.
  """
  if ids_BT.shape[1] > length:
    raise InputError(
      f"texts of {ids_BT.shape[1]} tokens are too long for a model of "
      f"{length} positions; cut them."
    )
  x = nn.Embed(vocabulary, width, dtype=dtype, name="token_embed")(ids_BT)
  positions = nn.Embed(length, width, dtype=dtype, name="pos_embed")
  return x + positions(jnp.arange(ids_BT.shape[1]))[None]


def unit(x_BD: jax.Array) -> jax.Array:
  """Vectors of length one, in fp32."""
  x = x_BD.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def cosines(image_BP: jax.Array, text_CP: jax.Array) -> jax.Array:
  """Of all pairs of unit vectors: fp32 `[B, C]`."""
  # At a TPU's default precision they would be rounded to bf16.
  return jnp.matmul(image_BP, text_CP.T, precision="highest")


def init_params(model: nn.Module, key: jax.Array) -> dict:
  """Fresh parameters of CLIP or SigLIP.

  Args:
    model: of a config with `image_size` and `length`.
    key: random key.
  """
  side, length = model.config.image_size, model.config.length
  image, ids = jnp.zeros((1, side, side, 3)), jnp.zeros((1, length), jnp.int32)
  return model.init(key, image, ids)["params"]


# Of all that is here: heads and MLP width over tensor, the other large
# dimension over fsdp.
SHARDING_RULES = (
  (r"(.*/)?to_[qkv]/kernel", ("fsdp", "tensor", None)),
  (r"(.*/)?to_out/kernel", ("tensor", None, "fsdp")),
  (r"(.*/)?fc1/kernel", ("fsdp", "tensor")),
  (r"(.*/)?fc2/kernel", ("tensor", "fsdp")),
  (r"(.*/)?patch_embed/kernel", ("fsdp",)),
  (r"(.*/)?(token|pos)_embed/embedding", (None, "fsdp")),
  (r"(.*/)?(norm\w*/scale|bias)", ()),
)
