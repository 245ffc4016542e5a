# SPDX-License-Identifier: Apache-2.0
"""The f16c64 residual VAE (report section 3.1), for single images.

The encoder and decoder equal diffusers' `AutoencoderKLQwenImage21` on one
frame. Latents leave as raw posterior means; `normalise` brings them to the
unit scale on which the MMDiT works, with per-channel statistics that are
kept beside the weights (collection `latent_stats`).

Shapes: images `x_BHWC` in [-1, 1]; latents `z_BhwZ`, h = H/16, w = W/16.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.models import vae_blocks
from qi2_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Shape of the VAE.

  Attributes:
    image_channels: 4 (RGBA, Qwen-Image-2.1) or 3 (RGB).
    patch_size: pixels folded into channels before the first convolution.
    base_dim: encoder width at full resolution.
    decoder_base_dim: decoder width at full resolution.
    z_dim: latent channels.
    dim_mult: width multipliers per level; each level but the last halves.
    num_res_blocks: residual blocks per encoder level (decoder: one more).
    temporal_downsample: per downsampling level; fixes the shortcut's form.
    carry_temporal: declare the unused `time_conv` arrays of the public file.
    dtype: compute dtype; parameters stay fp32.
    remat: recompute each residual block of a level in the backward pass.
  """

  image_channels: int = 4
  patch_size: int = 1
  base_dim: int = 96
  decoder_base_dim: int = 144
  z_dim: int = 64
  dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True, True)
  carry_temporal: bool = True
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @property
  def factor(self) -> int:
    """Pixels per latent along each side."""
    return self.patch_size * 2 ** (len(self.dim_mult) - 1)


# `tiny` keeps f16c64 but folds 4x4 patches first: a 2-core CPU trains it in
# two minutes. Its sizes are ours; the others are the public model's.
PRESETS = {
  "qwen_image_2_1": VAEConfig(),
  "qwen_image_2_0": VAEConfig(image_channels=3, carry_temporal=False),
  "tiny": VAEConfig(
    patch_size=4, base_dim=32, decoder_base_dim=32, dim_mult=(1, 2, 2),
    num_res_blocks=1, temporal_downsample=(False, True),
    carry_temporal=False,
  ),
}  # fmt: skip


def _conv3(features: int, config: VAEConfig) -> nn.Conv:
  return nn.Conv(features, (3, 3), padding=1, dtype=config.dtype)


class Encoder(nn.Module):
  """`[B, H, W, C]` -> moments `[B, h, w, 2Z]` before the 1x1 head.

  Stem and levels see a bounded neighbourhood, the tail sees everything:
  `vae_tiling` runs the former on tiles.
  """

  config: VAEConfig

  def setup(self):
    """Declares the parts in the order in which they run."""
    cfg = self.config
    last = len(cfg.dim_mult) - 1
    self.conv_in = _conv3(cfg.base_dim, cfg)
    self.down = [
      vae_blocks.DownBlock(
        cfg.base_dim * mult, cfg.num_res_blocks, down=i != last,
        temporal=i != last and cfg.temporal_downsample[i],
        carry_temporal=cfg.carry_temporal, dtype=cfg.dtype, remat=cfg.remat,
      )
      for i, mult in enumerate(cfg.dim_mult)
    ]  # fmt: skip
    self.mid = vae_blocks.MidBlock(cfg.dtype)
    self.norm_out = vae_blocks.ChannelNorm()
    self.conv_out = _conv3(2 * cfg.z_dim, cfg)

  def stem(self, x):
    """Patchified image to the first feature map."""
    return self.conv_in(x)

  def level(self, x, index: int):
    """One level; every level but the last halves the map."""
    return self.down[index](constrain(x, "batch", None, None, None))

  def tail(self, x):
    """Attention over the whole map, and the output convolution."""
    return self.conv_out(nn.silu(self.norm_out(self.mid(x))))

  def __call__(self, x):
    """Runs the encoder on patchified input."""
    x = self.stem(x)
    for index in range(len(self.config.dim_mult)):
      x = self.level(x, index)
    return self.tail(x)


class Decoder(nn.Module):
  """Latents `[B, h, w, Z]` -> patchified image.

  The stem sees everything, levels and tail a bounded neighbourhood.
  """

  config: VAEConfig

  def setup(self):
    """Declares the parts in the order in which they run."""
    cfg = self.config
    dims = [cfg.decoder_base_dim * m for m in reversed(cfg.dim_mult)]
    temporal = tuple(reversed(cfg.temporal_downsample))
    last = len(dims) - 1
    self.conv_in = _conv3(dims[0], cfg)
    self.mid = vae_blocks.MidBlock(cfg.dtype)
    self.up = [
      vae_blocks.UpBlock(
        dim, cfg.num_res_blocks, up=i != last,
        temporal=i != last and temporal[i],
        carry_temporal=cfg.carry_temporal, dtype=cfg.dtype, remat=cfg.remat,
      )
      for i, dim in enumerate(dims)
    ]  # fmt: skip
    self.norm_out = vae_blocks.ChannelNorm()
    self.conv_out = _conv3(cfg.image_channels * cfg.patch_size**2, cfg)

  def stem(self, z):
    """Latents to the first feature map, attention over all of it."""
    return self.mid(self.conv_in(z))

  def level(self, x, index: int):
    """One level; every level but the last doubles the map."""
    return self.up[index](constrain(x, "batch", None, None, None))

  def tail(self, x):
    """The output convolution; the result is not clamped."""
    return self.conv_out(nn.silu(self.norm_out(x)))

  def __call__(self, z):
    """Runs the decoder; the result is not clamped."""
    x = self.stem(z)
    for index in range(len(self.config.dim_mult)):
      x = self.level(x, index)
    return self.tail(x)


class VAE(nn.Module):
  """Encoder and decoder with their 1x1 heads."""

  config: VAEConfig

  def setup(self):
    """Declares the parts; both directions share the config."""
    cfg = self.config
    self.encoder = Encoder(cfg)
    self.decoder = Decoder(cfg)
    self.quant_conv = nn.Dense(2 * cfg.z_dim, dtype=cfg.dtype)
    self.post_quant_conv = nn.Dense(cfg.z_dim, dtype=cfg.dtype)
    self.latent_mean = self.variable(
      "latent_stats", "mean", jnp.zeros, (cfg.z_dim,)
    )
    self.latent_std = self.variable(
      "latent_stats", "std", jnp.ones, (cfg.z_dim,)
    )

  def moments(self, x_BHWC):
    """Posterior mean and log variance, `[B, h, w, Z]` each."""
    x = vae_blocks.patchify(x_BHWC, self.config.patch_size)
    return jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)

  def encode(self, x_BHWC):
    """Images in [-1, 1] -> normalised posterior means `[B, h, w, Z]`."""
    mean, _ = self.moments(x_BHWC)
    return normalise(mean, self.latent_mean.value, self.latent_std.value)

  def decode_raw(self, z_BhwZ):
    """Unnormalised latents -> images `[B, H, W, C]`, not clamped."""
    x = self.decoder(self.post_quant_conv(z_BhwZ))
    return vae_blocks.unpatchify(x, self.config.patch_size)

  def decode(self, z_BhwZ):
    """Normalised latents -> images in [-1, 1]."""
    z = denormalise(z_BhwZ, self.latent_mean.value, self.latent_std.value)
    return jnp.clip(self.decode_raw(z).astype(jnp.float32), -1.0, 1.0)

  def __call__(self, x_BHWC):
    """Reconstruction and posterior moments: `(x_hat, mean, logvar)`."""
    mean, logvar = self.moments(x_BHWC)
    return self.decode_raw(mean), mean, logvar


def init_variables(module: VAE, key: jax.Array) -> dict:
  """Fresh variables; their shapes do not depend on the image size."""
  side = 2 * module.config.factor
  image = jnp.zeros((1, side, side, module.config.image_channels))
  return dict(module.init(key, image))


def identity_stats(z_dim: int) -> dict:
  """Latent statistics that leave latents as they are."""
  return {"mean": jnp.zeros((z_dim,)), "std": jnp.ones((z_dim,))}


def _channels(stat: jax.Array) -> jax.Array:
  return stat.astype(jnp.float32)[None, None, None, :]


def normalise(z_BhwZ, mean_Z, std_Z):
  """Per-channel `(z - mean) / std` in fp32."""
  return (z_BhwZ.astype(jnp.float32) - _channels(mean_Z)) / _channels(std_Z)


def denormalise(z_BhwZ, mean_Z, std_Z):
  """Inverse of `normalise`."""
  return z_BhwZ.astype(jnp.float32) * _channels(std_Z) + _channels(mean_Z)


# Convolutions are small beside the MMDiT: shard output features over fsdp.
SHARDING_RULES = (
  (r"(.*/)?latent_stats/.*", ()),
  (r"(.*/)?(bias|gamma)", ()),
  (r"(.*/)?kernel", ("fsdp",)),
)
