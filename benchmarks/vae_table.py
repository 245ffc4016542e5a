# SPDX-License-Identifier: Apache-2.0
"""One table of VAEs of any diffusers class, as in Table 1 of the report.

    python benchmarks/vae_table.py --data=images --size=256 --out=runs/table \\
      --models=Qwen-Image-2.1,stable-diffusion-3.5/vae,Wan2.2/vae,runs/vae

Needs the test extra (torch, diffusers) and local folders; nothing is
downloaded. A folder is a VAE in the diffusers layout, or holds one as `vae`.
`AutoencoderKLQwenImage21` and our workdirs run in JAX, every other class in
torch on its own device; all are scored by `qi2_jax.evaluate_vae`, on the same
pixels, in fp32.
"""

import json
import os
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags

from experiments import evaluate as config_file
from qi2_jax import cli, evaluate_vae
from qi2_jax.errors import InputError
from qi2_jax.evaluation.images import flatten
from qi2_jax.interop import vae as own
from qi2_jax.interop.model_folder import component


def class_name(path: str) -> str:
  """The diffusers class of a VAE folder; our own for a workdir."""
  try:
    with open(os.path.join(component(path, "vae"), "config.json")) as file:
      return json.load(file).get("_class_name", own.CLASS)
  except OSError as error:
    raise InputError(
      f"{path} holds no VAE ({error.strerror}); pass a diffusers VAE folder, "
      "its pipeline folder or a workdir."
    ) from error


def load_torch(path: str, device: str):
  """A VAE of another class, in fp32.

  Raises:
    InputError: diffusers has no such class, or cannot read the folder.
  """
  import diffusers

  name = class_name(path)
  if not hasattr(diffusers, name):
    raise InputError(f"{path} is a {name}, which this diffusers does not have.")
  folder = component(path, "vae")
  model = getattr(diffusers, name).from_pretrained(folder)
  return model.float().eval().to(device)


def factor(model) -> int:
  """Pixels per latent along a side, which sides must be multiples of."""
  for name in ("spatial_compression_ratio", "scale_factor_spatial"):
    value = getattr(model, name, None) or model.config.get(name)
    if value:
      return int(value)
  for name in ("block_out_channels", "encoder_block_out_channels"):
    if name in model.config:
      return 2 ** (len(model.config[name]) - 1)
  return 32


def latents_of(encoded):
  """The posterior mode, or the latents of a plain autoencoder."""
  if hasattr(encoded, "latent_dist"):
    return encoded.latent_dist.mode()
  return encoded.latent


def is_video(model) -> bool:
  """Whether the class wants a frame axis, though its kernels may be 2-D."""
  return "temperal_downsample" in model.config or any(
    p.ndim == 5 for p in model.parameters()
  )


def torch_reconstructor(model) -> Callable:
  """A diffusers VAE as a function from images of one shape to images.

  RGB over white goes in; classes for video see one frame.
  """
  import torch

  side = factor(model)
  video = is_video(model)

  def reconstruct(images):
    height, width = images[0].shape[:2]
    batch = np.stack([flatten(image) for image in images])
    pad = [(0, 0), *((0, -n % side) for n in (height, width)), (0, 0)]
    batch = np.pad(batch, pad, mode="edge")
    x = torch.tensor(batch.transpose(0, 3, 1, 2), dtype=torch.float32)
    x = (x / 127.5 - 1).to(next(model.parameters()).device)
    with torch.no_grad():
      z = latents_of(model.encode(x[:, :, None] if video else x))
      out = model.decode(z).sample
    out = out[:, :, 0] if video else out
    out = out.clamp(-1, 1).cpu().numpy().transpose(0, 2, 3, 1)
    return list(np.uint8(np.round((out + 1) * 127.5))[:, :height, :width, :3])

  return reconstruct


def torch_sizes(model) -> dict[str, int]:
  """Parameters of encoder and decoder with what stands beside them."""
  count = lambda names: sum(  # noqa: E731
    p.numel()
    for n in names
    if (part := getattr(model, n, None)) is not None
    for p in part.parameters()
  )
  return {
    "encoder": count(("encoder", "quant_conv")),
    "decoder": count(("decoder", "post_quant_conv")),
  }


def models(paths: list[str], config, device: str) -> Iterator[tuple]:
  """`(label, reconstruct, parameters)` of every folder."""
  for label, path in zip(evaluate_vae.labels(paths), paths):
    if class_name(path) == own.CLASS:
      ((_, reconstruct, size),) = evaluate_vae.models([path], config)
      yield label, reconstruct, size
    else:
      model = load_torch(path, device)
      yield label, torch_reconstructor(model), torch_sizes(model)


def _define_flags() -> None:
  flags.DEFINE_list("models", None, "VAE folders, comma-separated.")
  flags.DEFINE_string("data", None, "Dataset folder or folder of images.")
  flags.DEFINE_string("out", None, "Folder to write.")
  flags.DEFINE_integer("size", 0, "Side to crop and resize to; 0: as it is.")
  flags.DEFINE_integer("count", 0, "Images at most; 0: all.")
  flags.DEFINE_enum("ocr", "none", evaluate_vae.READERS, "Reader for the NED.")
  flags.DEFINE_string("vgg", "", "File of torchvision's vgg16, for LPIPS.")
  flags.DEFINE_string("linear", "", "File of the weights of `lpips`.")
  flags.DEFINE_string("device", "cpu", "Of torch, for other classes.")
  flags.mark_flags_as_required(["models", "data", "out"])


def main() -> int:
  """Entry point."""
  values = flags.FLAGS
  config = config_file.get_config("vae")
  config.count, config.ocr = values.count, values.ocr
  config.size = (values.size, values.size) if values.size else ()
  config.lpips.vgg, config.lpips.linear = values.vgg, values.linear
  found = models(values.models, config, values.device)
  evaluate_vae.evaluate(found, config, values.data, values.out)
  return 0


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
