# SPDX-License-Identifier: Apache-2.0
"""Compares this code with diffusers on one pipeline folder.

    python -m qi2_jax.convert verify DIR

Needs torch, diffusers and accelerate beside qi2_jax; it is the one module
that imports them. The reference runs first and is then freed, so that one of
the two has to fit in memory at a time. Errors are the largest difference
over the largest magnitude; images are compared by PSNR (peak 1). The weights
are DIR's own, so with random weights the images are noise and the figures
still hold.
"""

import dataclasses
import functools
import gc
import importlib.util
import os

import jax
import numpy as np
from absl import flags, logging
from PIL import Image, ImageDraw

from qi2_jax.conditioning.conditioner import stack
from qi2_jax.conditioning.images import area_size
from qi2_jax.errors import InputError
from qi2_jax.interop.model_folder import check_pipeline_folder
from qi2_jax.interop.published import read_json
from qi2_jax.pipeline import Pipeline

_SIGMA = 0.7
# What counts as equal; fp32 rounding of full-size models stays below these.
_MAX_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}
_MIN_PSNR = {"float32": 50.0, "bfloat16": 20.0}


@dataclasses.dataclass(frozen=True)
class Case:
  """One prompt to run through both.

  Attributes:
    name: for the table.
    prompt: text or edit instruction.
    references: RGBA images.
    noise: starting noise `[h, w, Z]`.
  """

  name: str
  prompt: str
  references: tuple[Image.Image, ...]
  noise: np.ndarray


def _define_flags():
  flags.DEFINE_integer("resolution", 256, "Side of the images in pixels.")
  flags.DEFINE_integer("steps", 8, "Euler steps of the image comparison.")
  flags.DEFINE_float("guidance", 1.0, "Guidance scale of the images.")


def torch_processor(folder: str):
  """The folder's processor, or its equal where torchvision is missing.

  transformers' Qwen3VLProcessor cannot be built without torchvision, even
  for images alone; its tokenizer and image processor can.
  """
  import transformers

  if importlib.util.find_spec("torchvision"):
    return transformers.Qwen3VLProcessor.from_pretrained(folder)
  logging.info("torchvision is missing: using the image processor alone")
  return _PlainProcessor(folder)


class _PlainProcessor:
  """Tokenizer plus image processor, for image prompts alone."""

  def __init__(self, folder: str):
    import transformers

    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self.image_processor = (
      transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    )

  def apply_chat_template(self, messages, **options):
    return [self.tokenizer.apply_chat_template(messages, **options)]

  def __call__(self, text, images=None, **options):
    import transformers

    if images is None:
      return self.tokenizer(text, **options)
    pixels = self.image_processor(images=images, return_tensors="pt")
    pad = "<|image_pad|>"
    counts = iter(pixels["image_grid_thw"].prod(-1) // 4)
    expanded = []
    for prompt in text:
      head, *rest = prompt.split(pad)
      expanded.append(
        head + "".join(pad * int(next(counts)) + part for part in rest)
      )
    out = self.tokenizer(expanded, **options)
    slot = self.tokenizer.convert_tokens_to_ids(pad)
    kinds = (out["input_ids"] == slot).int()
    return transformers.BatchFeature(
      {**out, **pixels, "mm_token_type_ids": kinds}
    )


def torch_pipeline(path: str, dtype: str):
  """diffusers' pipeline of a folder.

  Raises:
    InputError: torch or diffusers is not installed.
  """
  try:
    import diffusers
    import torch
    import transformers
  except ImportError as error:
    raise InputError(
      f"verify needs torch and diffusers >= 0.42 ({error}); install "
      "qi2_jax[test]."
    ) from error
  kinds = {
    "transformer": diffusers.QwenImage21Transformer2DModel,
    "vae": diffusers.AutoencoderKLQwenImage21,
    "text_encoder": transformers.Qwen3VLForConditionalGeneration,
  }
  # One by one: the pipeline's own loader insists on the full processor class.
  parts = {
    name: kind.from_pretrained(
      os.path.join(path, name), torch_dtype=getattr(torch, dtype)
    )
    for name, kind in kinds.items()
  }
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
    os.path.join(path, "scheduler")
  )
  index = read_json(os.path.join(path, "model_index.json"))
  pipeline = diffusers.QwenImage21Pipeline(
    scheduler=scheduler,
    processor=torch_processor(os.path.join(path, "processor")),
    sample_sigmas=index.get("sample_sigmas"), **parts,
  )  # fmt: skip
  pipeline.set_progress_bar_config(disable=True)
  return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def cases(resolution: int, channels: int) -> list[Case]:
  """A text prompt and an edit with two references of unlike sizes.

  Args:
    resolution: side of the square area of images, in pixels.
    channels: latent channels.
  """
  wide, tall = _picture(640, 400, "navy"), _picture(300, 480, "darkgreen")
  rng = np.random.default_rng(0)
  out = []
  for name, prompt, references in (
    ("T2I", "a red circle above a blue square, flat colours", ()),
    ("edit", "put the circle of <image1> into <image2>", (wide, tall)),
  ):
    height, width = resolution, resolution
    if references:
      ratio = references[-1].width / references[-1].height
      height, width = area_size(ratio, resolution)
    noise = rng.standard_normal((height // 16, width // 16, channels))
    out.append(Case(name, prompt, references, noise.astype(np.float32)))
  return out


def _picture(width: int, height: int, colour: str) -> Image.Image:
  """A drawing with a half-transparent part."""
  image = Image.new("RGBA", (width, height), "white")
  draw = ImageDraw.Draw(image)
  draw.ellipse((20, 20, width // 2, height // 2), fill=colour)
  draw.rectangle((width // 2, 30, width - 9, height - 9), fill=(200, 90, 0, 99))
  return image


def reference_outputs(pipeline, case: Case, settings) -> dict:
  """What diffusers makes of one case, as numpy arrays.

  Args:
    pipeline: of `torch_pipeline`.
    case: the prompt.
    settings: the flags resolution, steps and guidance.
  """
  import torch

  device, dtype = pipeline.device, pipeline.transformer.dtype
  numpy = lambda t: t.detach().float().cpu().numpy()  # noqa: E731
  height, width = (16 * s for s in case.noise.shape[:2])
  packed = torch.tensor(case.noise.reshape(1, -1, case.noise.shape[-1]))
  x = packed.to(device, dtype)
  resized, latents = [], [x[:, :0]]
  with torch.no_grad():
    for image in case.references:
      h, w = area_size(image.width / image.height, settings.resolution)
      resized.append(pipeline.image_processor.resize(image, h, w))
      pixels = pipeline.image_processor.preprocess(image, h, w)
      z = pipeline._encode_vae_image(
        pixels.unsqueeze(2).to(device, dtype), None
      )
      latents.append(z.flatten(2).transpose(1, 2))
    text, _, slots = pipeline.encode_prompt(
      case.prompt, resized or None, device=device
    )
    slots = torch.cat([slots, slots.new_ones(1, x.shape[1] // 4)], 1)
    grids = [(1, i.height // 16, i.width // 16) for i in resized]
    references = torch.cat(latents, 1)
    velocity = pipeline.transformer(
      hidden_states=torch.cat([references, x], 1), encoder_hidden_states=text,
      timestep=torch.full((1,), _SIGMA, device=device, dtype=dtype),
      img_shapes=[[*grids, (1, height // 16, width // 16)]], img_mask=slots,
      return_dict=False,
    )[0][:, -x.shape[1] :]  # fmt: skip
    image = pipeline(
      case.prompt, image=list(case.references) or None, latents=packed,
      height=height, width=width, num_inference_steps=settings.steps,
      output_resolution=settings.resolution, output_type="np",
      true_cfg_scale=settings.guidance,
      negative_prompt=" " if settings.guidance > 1 else None,
    ).images[0]  # fmt: skip
    z = torch.tensor(case.noise, device=device, dtype=pipeline.vae.dtype)
    z = z.permute(2, 0, 1)[None, :, None]
    decoded = pipeline.vae.decode(z).sample[0, :, 0].permute(1, 2, 0)
  return {
    "text": numpy(text), "references": numpy(references),
    "velocity": numpy(velocity), "decoded": numpy(decoded), "image": image,
  }  # fmt: skip


def our_outputs(
  pipeline: Pipeline, case: Case, reference: dict, settings
) -> dict:
  """The same from our modules; each gets the reference's inputs.

  Thus an error shows in the module that makes it.
  """
  generator, frozen = pipeline.generator, pipeline.frozen
  conditioner = generator.conditioner
  request = pipeline.request(
    case.prompt, images=case.references, resolution=settings.resolution,
    height=16 * case.noise.shape[0], width=16 * case.noise.shape[1],
    latents=case.noise, negative_prompt=" ",
  )  # fmt: skip
  host = conditioner.host(
    case.prompt, request.references, (request.height, request.width),
    conditioner.fitting_length(case.prompt, request.references),
  )  # fmt: skip
  cond = jax.jit(conditioner.encode)(frozen, stack([host]))
  length = reference["text"].shape[1]
  text = np.zeros(cond.text_BTC.shape, np.float32)
  text[:, :length] = reference["text"]
  given = cond.replace(text_BTC=text, references_BRZ=reference["references"])
  x = case.noise.reshape(1, -1, case.noise.shape[-1])
  velocity = jax.jit(generator.model.apply)(
    {"params": pipeline.params}, x, np.full((1,), _SIGMA, np.float32), given
  )
  config = dataclasses.replace(
    pipeline.sampling_with(settings.guidance, settings.steps), batch_size=1
  )
  image = pipeline.generate([request], config)[0]
  decode_raw = jax.jit(
    functools.partial(generator.vae.apply, method="decode_raw")
  )
  decoded = np.clip(decode_raw(frozen.vae, case.noise[None]), -1, 1)
  return {
    "text": np.asarray(cond.text_BTC)[:, :length],
    "references": np.asarray(cond.references_BRZ),
    "velocity": np.asarray(velocity), "decoded": decoded[0],
    "image": 0.5 * image + 0.5,
  }  # fmt: skip


def relative(ours, theirs) -> float:
  """Largest difference over the largest magnitude."""
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def psnr(ours, theirs) -> float:
  """PSNR in dB of images in [0, 1]."""
  error = np.mean(np.square(np.float64(ours) - np.float64(theirs)))
  return float(-10 * np.log10(max(error, 1e-20)))


def verify(path: str, settings) -> int:
  """Prints one line per component and case; returns the exit status.

  Args:
    path: pipeline folder.
    settings: flags resolution, steps, guidance, dtype.

  Raises:
    InputError: the folder is no pipeline, or torch is missing.
  """
  check_pipeline_folder(path)
  dtype = settings.dtype or "float32"
  logging.info("running diffusers on %s", path)
  theirs = torch_pipeline(path, dtype)
  made = cases(settings.resolution, theirs.transformer.config.in_channels)
  expected = [reference_outputs(theirs, case, settings) for case in made]
  del theirs
  gc.collect()
  logging.info("running qi2_jax")
  pipeline = Pipeline.load(path, dtype)
  rows = []
  for case, reference in zip(made, expected):
    ours = our_outputs(pipeline, case, reference, settings)
    rows += compare(case.name, ours, reference, dtype)
  print(f"{'case':5} {'component':26} {'figure':>12}   bar")
  for case, component, figure, bar, passed in rows:
    verdict = "ok" if passed else "DIFFERS"
    print(f"{case:5} {component:26} {figure:>12}   {bar}  {verdict}")
  failed = sum(not row[-1] for row in rows)
  print(f"{len(rows) - failed} of {len(rows)} agree in {dtype}.")
  return 1 if failed else 0


_COMPONENTS = {
  "text": "text encoder, states",
  "references": "VAE, reference latents",
  "velocity": f"MMDiT, sigma {_SIGMA}",
  "decoded": "VAE, decoded noise",
}


def compare(case: str, ours: dict, theirs: dict, dtype: str) -> list[tuple]:
  """Rows `(case, component, figure, bar, passed)`."""
  rows = []
  for key, component in _COMPONENTS.items():
    if not theirs[key].size:
      continue
    error, bar = relative(ours[key], theirs[key]), _MAX_ERROR[dtype]
    figure = f"{error:.2e}"
    rows.append((case, component, figure, f"<= {bar:g}", error <= bar))
  value, bar = psnr(ours["image"], theirs["image"]), _MIN_PSNR[dtype]
  rows.append((case, "image", f"{value:.1f} dB", f">= {bar:g}", value >= bar))
  return rows
