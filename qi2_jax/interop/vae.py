# SPDX-License-Identifier: Apache-2.0
"""VAE config and parameters <-> diffusers `AutoencoderKLQwenImage21`.

The table works on the merged collections `params` and `carried` (see
`merge`). The latent statistics live in config.json, as published.
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.interop import published as fields
from qi2_jax.interop.mapping import Entry, convolution, vector
from qi2_jax.models.vae import VAEConfig

CLASS = "AutoencoderKLQwenImage21"
_SIZES = {
  "base_dim": "base_dim",
  "decoder_base_dim": "decoder_base_dim",
  "z_dim": "z_dim",
  "dim_mult": "dim_mult",
  "num_res_blocks": "num_res_blocks",
}
# The two scale factors only describe the model; diffusers reads neither.
_KNOWN = (
  *_SIZES, "attn_scales", "temperal_downsample", "dropout", "latents_mean",
  "latents_std", "is_residual", "in_channels", "out_channels", "patch_size",
  "scale_factor_temporal", "scale_factor_spatial",
)  # fmt: skip
_EXTRAS = ("dtype",)

_RENAMES = (
  (r"mid/resnet_(\d)", r"mid_block.resnets.\1"),
  (r"mid/attention", "mid_block.attentions.0"),
  (r"down_(\d+)/resnet_(\d+)", r"down_blocks.\1.resnets.\2"),
  (r"down_(\d+)/downsample", r"down_blocks.\1.downsampler.resample.1"),
  (r"down_(\d+)/time_conv", r"down_blocks.\1.downsampler.time_conv"),
  (r"up_(\d+)/resnet_(\d+)", r"up_blocks.\1.resnets.\2"),
  (r"up_(\d+)/upsample", r"up_blocks.\1.upsampler.resample.1"),
  (r"up_(\d+)/time_conv", r"up_blocks.\1.upsampler.time_conv"),
)


def table(path: str) -> Entry:
  """Entry of a path in the merged tree.

  Raises:
    InputError: the leaf is no kernel, bias or gamma.
  """
  name = path
  for pattern, replacement in _RENAMES:
    name = re.sub(pattern, replacement, name)
  stem, _, leaf = name.replace("/", ".").rpartition(".")
  if leaf == "kernel":
    return convolution(f"{stem}.weight")
  if leaf == "bias":
    return vector(f"{stem}.bias")
  if leaf == "gamma":
    # diffusers keeps the attention norm 2-D and all others 3-D.
    tail = (1, 1) if ".attentions." in stem else (1, 1, 1)
    return vector(f"{stem}.gamma", (-1, *tail))
  raise InputError(f"VAE parameter {path} has no diffusers counterpart.")


def merge(params: dict, carried: dict) -> dict:
  """Overlays the `carried` collection onto `params` (disjoint leaves)."""
  out = dict(params)
  for key, value in carried.items():
    out[key] = (
      merge(out.get(key, {}), value) if isinstance(value, dict) else value
    )
  return out


def split(tree: dict) -> tuple[dict, dict]:
  """Separates `time_conv` subtrees: `(params, carried)`."""
  params, carried = {}, {}
  for key, value in tree.items():
    if key == "time_conv":
      carried[key] = value
    elif isinstance(value, dict):
      kept, taken = split(value)
      if kept:
        params[key] = kept
      if taken:
        carried[key] = taken
    else:
      params[key] = value
  return params, carried


def config(published: Mapping) -> VAEConfig:
  """Our config of a vae/config.json.

  `carry_temporal` is what diffusers declares: true if any level has a
  temporal kernel. The compute dtype is fp32 unless a native folder states
  another.

  Raises:
    InputError: a field has a value that no code path implements.
  """
  fields.check_class(published, CLASS)
  fields.check_known(published, _KNOWN)
  fields.check_value(published, "attn_scales", ([],))
  fields.check_value(published, "is_residual", (True,))
  fields.check_value(published, "dropout", (0.0, 0))
  given = {k: v for k, v in published.items() if v is not None}
  sizes = fields.integers(given, _SIZES)
  if published.get("decoder_base_dim", 0) is None:
    sizes["decoder_base_dim"] = sizes.get("base_dim", VAEConfig.base_dim)
  more = fields.integers(
    given, {n: n for n in ("patch_size", "in_channels", "out_channels")}
  )
  patch = more.get("patch_size", 1)
  channels = more.get("in_channels", 4)
  fields.check_value(published, "out_channels", (channels,))
  if channels % patch**2:
    raise InputError(
      f"config.json has in_channels={channels}, which patch_size={patch} "
      "does not fold evenly; download it again."
    )
  temporal = published.get("temperal_downsample", [False, True, True, True])
  levels = len(sizes.get("dim_mult", VAEConfig.dim_mult)) - 1
  if len(temporal) != levels or not all(type(t) is bool for t in temporal):
    raise InputError(
      f"config.json has temperal_downsample={temporal} but dim_mult needs "
      f"{levels} true or false values; download it again."
    )
  extras = fields.extras(published, _EXTRAS)
  if "dtype" in extras:
    extras["dtype"] = jnp.dtype(extras["dtype"])
  return VAEConfig(
    **sizes, image_channels=channels // patch**2, patch_size=patch,
    temporal_downsample=tuple(temporal), carry_temporal=any(temporal),
    **extras,
  )  # fmt: skip


def latent_stats(published: Mapping) -> dict[str, np.ndarray]:
  """The collection `latent_stats`: `mean` and `std`, fp32 `[Z]`.

  Raises:
    InputError: they are absent, of another length, or no numbers.
  """
  size = published.get("z_dim", VAEConfig.z_dim)
  out = {}
  for name in ("mean", "std"):
    try:
      out[name] = np.array(published[f"latents_{name}"], np.float32)
    except (KeyError, TypeError, ValueError):
      out[name] = np.zeros(0, np.float32)
    if out[name].shape != (size,) or not np.isfinite(out[name]).all():
      raise InputError(
        f"config.json of the VAE needs {size} numbers in latents_{name}; "
        "download it again."
      )
  if (out["std"] <= 0).any():
    raise InputError(
      "config.json of the VAE has a latents_std that is not positive; "
      "download it again."
    )
  return out


def published(config: VAEConfig, stats: Mapping) -> dict:
  """A config.json that diffusers loads.

  Args:
    config: shape of the VAE.
    stats: the collection `latent_stats`.
  """
  channels = config.image_channels * config.patch_size**2
  # The shortest decimal that is this fp32 value, so that published numbers
  # come back as they were written.
  decimals = {
    name: [float(str(v)) for v in np.asarray(stats[name], np.float32)]
    for name in ("mean", "std")
  }
  return {
    "_class_name": CLASS, "base_dim": config.base_dim,
    "decoder_base_dim": config.decoder_base_dim, "z_dim": config.z_dim,
    "dim_mult": list(config.dim_mult),
    "num_res_blocks": config.num_res_blocks, "attn_scales": [],
    "temperal_downsample": list(config.temporal_downsample), "dropout": 0.0,
    "latents_mean": decimals["mean"], "latents_std": decimals["std"],
    "is_residual": True, "in_channels": channels, "out_channels": channels,
    "patch_size": config.patch_size if config.patch_size > 1 else None,
    "scale_factor_temporal": 2 ** sum(config.temporal_downsample),
    "scale_factor_spatial": config.factor,
  }  # fmt: skip


def native(config: VAEConfig, stats: Mapping) -> dict:
  """The published fields and our own; `config` reads it back."""
  extras = {"dtype": np.dtype(config.dtype).name}
  return {**published(config, stats), "qi2_jax": extras}
