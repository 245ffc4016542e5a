# SPDX-License-Identifier: Apache-2.0
"""VAE parameters <-> diffusers `AutoencoderKLQwenImage21`.

Works on the merged collections `params` and `carried` (see `merge`).
"""

import re

from qi2_jax.errors import InputError
from qi2_jax.interop.mapping import Entry, convolution, vector

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
