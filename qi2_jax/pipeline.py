# SPDX-License-Identifier: Apache-2.0
"""A model folder or training workdir as one object that makes images.

pipeline = Pipeline.load("Qwen-Image-2.1")
images = pipeline(["a cat"], resolution=1024)
edited = pipeline(["make it night"], images=["photo.png"])
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qi2_jax.conditioning.conditioner import (
  Conditioner,
  Frozen,
  to_uint8,
  to_unit,
)
from qi2_jax.conditioning.images import (
  explicit_size,
  load_reference,
  target_size,
  with_alpha,
)
from qi2_jax.errors import InputError
from qi2_jax.flow.generate import Generator, Request, SamplingConfig
from qi2_jax.interop import encoder_folder, model_folder, scheduler
from qi2_jax.interop import lora as lora_files
from qi2_jax.interop.published import read_json
from qi2_jax.models import lora, mmdit, qwen3_vl
from qi2_jax.models.vae import VAE
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import tree_shardings
from qi2_jax.training import build, workdir

# Prompts are padded to a multiple of this many tokens, so that few programs
# serve all of them; ours.
_TEXT_BUCKET = 128
_FOLDER_SIDE = 1024  # the public pipeline's default resolution


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """MMDiT, VAE and text encoder, ready to make images.

  Attributes:
    generator: the modules.
    params: MMDiT parameters (the EMA of a run).
    frozen: variables of VAE and text encoder.
    sampling: the model's own sampling defaults.
    side: default resolution: side of the square area of images, in pixels.
    step: training step of the weights, None for an imported model.
    notes: what a reader of the images must know (stand-ins).
    mesh: the devices that share the weights, or None for one device.
  """

  generator: Generator
  params: dict
  frozen: Frozen
  sampling: SamplingConfig
  side: int
  step: int | None
  notes: tuple[str, ...]
  mesh: Mesh | None = None

  @classmethod
  def load(
    cls, path: str, dtype: str | None = None, devices: int | None = None
  ) -> "Pipeline":
    """Loads a pipeline folder (diffusers' or imported) or a workdir.

    Args:
      path: the folder.
      dtype: `float32` or `bfloat16`, compute dtype of all models and dtype
        of the weights of MMDiT and encoder. By default a workdir keeps its
        own, a folder is computed in fp32 on CPU and in bf16 elsewhere.
      devices: how many devices share the weights of a folder's MMDiT and
        encoder, tensor-parallel; by default one on CPU, all elsewhere. A
        workdir's weights go to one device.

    Raises:
      InputError: the folder is neither, or is damaged, or its heads cannot
        be split over that many devices.
    """
    if not os.path.isdir(path):
      raise InputError(f"the model folder {path} does not exist.")
    if workdir.is_workdir(path):
      return _from_workdir(path, dtype)
    model_folder.check_pipeline_folder(path)
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    count = devices or (1 if on_cpu else len(jax.local_devices()))
    return _from_folder(path, dtype, count)

  @property
  def channels(self) -> int:
    """Channels of images: 4 with alpha, 3 without."""
    return self.generator.vae.config.image_channels

  def with_loras(self, adapters: Sequence[str]) -> "Pipeline":
    """The pipeline with LoRA adapters merged into the MMDiT.

    Args:
      adapters: files or folders, each optionally followed by `:WEIGHT`.

    Raises:
      InputError: an adapter is unreadable or of another model.
    """
    params = self.params
    for adapter in adapters:
      path, weight = lora_files.split_weight(adapter)
      params = jax.jit(lora.merge)(params, lora_files.load_any(path, params),
                                   weight)  # fmt: skip
    return dataclasses.replace(self, params=params)

  def untrained(self) -> "Pipeline":
    """The same architecture with fresh random weights."""
    params = mmdit.init_params(self.generator.model, jax.random.key(1))
    # The head starts at zero, which would return the noise unchanged.
    leaves, tree = jax.tree.flatten(params)
    leaves = [
      leaf if leaf.any() else 0.02 * jax.random.normal(
        jax.random.key(i), leaf.shape
      )
      for i, leaf in enumerate(leaves)
    ]  # fmt: skip
    return dataclasses.replace(
      self, params=jax.tree.unflatten(tree, leaves), step=0
    )

  def request(
    self, prompt: str, *, images: Sequence = (), negative_prompt: str = "",
    height: int | None = None, width: int | None = None,
    size: str | None = None, resolution: int | None = None, seed: int = 0,
    latents: np.ndarray | None = None,
  ) -> Request:  # fmt: skip
    """One image to make, with references resized and the size settled.

    Args:
      prompt: text, or edit instruction.
      images: references: paths, PIL images or uint8 arrays `[H, W, 3 or 4]`.
      negative_prompt: what guidance steers away from.
      height: of the result in pixels, with `width`.
      width: of the result in pixels.
      size: `16:9` or `1280x768` in place of both.
      resolution: side of the square area of references and derived sizes.
      seed: seed of the starting noise.
      latents: starting noise `[h, w, Z]` in place of the seed.

    Raises:
      InputError: an unreadable image, or an impossible size.
    """
    side = resolution or self.side
    factor = self.generator.conditioner.factor
    references = tuple(
      load_reference(image, side, self.channels) for image in images
    )
    height, width = target_size(
      *explicit_size(size, height, width, side), references, side, factor
    )
    return Request(
      prompt, references, height, width, seed, negative_prompt, latents
    )

  def __call__(
    self, prompts: Sequence[str], *, guidance: float | None = None,
    steps: int | None = None, num: int = 1, seed: int = 0,
    latents: np.ndarray | None = None,
    progress: Callable[[float], None] = lambda n: None, **options,
  ) -> list[np.ndarray]:  # fmt: skip
    """Images of prompts: float32 `[H, W, C]` in [0, 1].

    Args:
      prompts: one text, or several.
      guidance: guidance scale; 1 is off; None is the model's default.
      steps: Euler steps; None is the model's default.
      num: images per prompt, with seeds `seed`, `seed + 1`, ...
      seed: seed of the first image of each prompt.
      latents: starting noise `[B, h, w, Z]`, one row per image.
      progress: called with the number of images finished.
      **options: of `request`: images, negative_prompt, height, width, size,
        resolution.

    Raises:
      InputError: bad prompts, images, sizes or numbers.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    rows = noise_rows(latents, len(prompts) * num)
    requests = [
      self.request(prompt, seed=seed + n, latents=rows[i * num + n], **options)
      for i, prompt in enumerate(prompts)
      for n in range(num)
    ]
    config = self.sampling_with(guidance, steps)
    made = self.generate(requests, config, progress)
    return [0.5 * image + 0.5 for image in made]

  def sampling_with(
    self, guidance: float | None = None, steps: int | None = None
  ) -> SamplingConfig:
    """The model's sampling defaults with what is not None replaced.

    Raises:
      InputError: `steps` for a distilled model that has its own levels, or
        numbers without meaning.
    """
    config = self.sampling
    if guidance is not None:
      if not math.isfinite(guidance) or guidance < 0:
        raise InputError(f"guidance {guidance} must be 0 or more.")
      config = dataclasses.replace(config, guidance=guidance)
    if steps is not None:
      if config.sigmas is not None and steps != len(config.sigmas):
        raise InputError(
          f"this model samples at its own {len(config.sigmas)} noise levels; "
          "leave the number of steps out."
        )
      config = dataclasses.replace(config, steps=steps)
    config.levels(256)  # too few steps are found before anything is compiled
    return config

  def stream(
    self, requests: Sequence[Request], config: SamplingConfig | None = None,
    progress: Callable[[float], None] = lambda n: None,
  ) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Yields `(number of the request, image)` as batches finish.

    Args:
      requests: what to make.
      config: how to sample; the model's defaults if None.
      progress: called with the number of images finished.

    Raises:
      InputError: a size that the VAE cannot produce.
    """
    requests = [
      dataclasses.replace(
        r,
        references=tuple(with_alpha(i, self.channels) for i in r.references),
      )
      for r in requests
    ]
    images = self.generator.stream(
      self.params, self.frozen, requests, config or self.sampling, progress
    )
    # Entered for each batch anew: between two of them the caller's own mesh
    # holds.
    on_mesh = (lambda: jax.set_mesh(self.mesh)) if self.mesh else nullcontext
    while True:
      with on_mesh():
        made = next(images, None)
      if made is None:
        return
      yield made

  def generate(
    self, requests: Sequence[Request], config: SamplingConfig | None = None,
    progress: Callable[[float], None] = lambda n: None,
  ) -> list[np.ndarray]:  # fmt: skip
    """All images of `stream`, in order: float32 `[H, W, C]` in [-1, 1]."""
    made = dict(self.stream(requests, config, progress))
    return [made[i] for i in range(len(requests))]

  def roundtrip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """VAE encode and decode of uint8 `[H, W, 3]` images of any sizes.

    Images of one size run as batches of `sampling.batch_size`, so that a
    size costs one compilation.
    """
    size = self.sampling.batch_size
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
      groups.setdefault(image.shape, []).append(i)
    out: list = [None] * len(images)
    for indices in groups.values():
      for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        padded = chosen + [chosen[-1]] * (size - len(chosen))
        batch = np.stack([with_alpha(images[i], self.channels) for i in padded])
        made = _roundtrip(self.generator.vae, self.frozen.vae, batch)
        for i, image in zip(chosen, to_uint8(np.asarray(made))):
          out[i] = image[..., :3]
    return out


def noise_rows(latents: np.ndarray | None, count: int) -> list:
  """Splits starting noise `[B, h, w, Z]` into one row (or None) per image.

  Raises:
    InputError: the array has another rank or number of rows.
  """
  if latents is None:
    return [None] * count
  if latents.ndim != 4 or len(latents) != count:
    raise InputError(
      f"the starting noise has shape {latents.shape}; {count} images need "
      f"[{count}, h, w, Z]."
    )
  return list(latents)


def _from_workdir(path: str, dtype: str | None) -> Pipeline:
  run = workdir.load(path, dtype)
  return Pipeline(
    generator=Generator(run.model, run.conditioner),
    params=run.params,
    frozen=run.frozen,
    sampling=build.sampling_config(run.config),
    side=round(math.sqrt(math.prod(run.config.data.buckets[0]))),
    step=run.step,
    notes=(f"text encoder: {run.conditioner.encoder.description}",),
  )


def _tensor_mesh(count: int, config: mmdit.MMDiTConfig) -> Mesh | None:
  """A mesh that splits attention heads over `count` devices.

  Raises:
    InputError: there are fewer devices, or the heads do not divide.
  """
  if count == 1:
    return None
  here = jax.local_devices()
  if count > len(here) or config.num_heads % count:
    raise InputError(
      f"cannot split {config.num_heads} attention heads over {count} of "
      f"{len(here)} devices; choose a smaller --devices that divides them."
    )
  return create_mesh({"tensor": count}, here[:count])


def _from_folder(path: str, dtype: str, devices: int) -> Pipeline:
  compute = jnp.dtype(dtype)
  schedule = read_json(f"{path}/scheduler/scheduler_config.json")
  index = read_json(f"{path}/model_index.json")
  # Damaged files anywhere are found before gigabytes are read.
  model_folder.check_weights(path)
  config = model_folder.mmdit_config(path)
  mesh = _tensor_mesh(devices, config)

  def by(rules):
    return mesh and (lambda abstract: tree_shardings(abstract, rules, mesh))

  encoder, encoder_params = encoder_folder.load(
    path, dtype=compute, param_dtype=compute,
    shardings=by(qwen3_vl.SHARDING_RULES),
  )  # fmt: skip
  if encoder.width != config.context_dim:
    raise InputError(
      f"the text encoder in {path} has {encoder.width} channels but the "
      f"transformer expects {config.context_dim}."
    )
  _, params = model_folder.load_mmdit(
    path, dtype=compute, shardings=by(mmdit.SHARDING_RULES)
  )
  vae_config, vae_variables = model_folder.load_vae(path)
  if mesh:
    # Small beside the others: every device has the whole VAE.
    vae_variables = jax.device_put(vae_variables, NamedSharding(mesh, P()))
  vae = VAE(dataclasses.replace(vae_config, dtype=compute))
  model = mmdit.MMDiT(
    build.with_kernel(dataclasses.replace(config, dtype=compute))
  )
  return Pipeline(
    generator=Generator(model, Conditioner(encoder, vae, _TEXT_BUCKET)),
    params=params,
    frozen=Frozen(vae_variables, encoder_params),
    sampling=SamplingConfig(
      batch_size=1, shift=scheduler.shift_config(schedule),
      sigmas=scheduler.sample_sigmas(index),
      round_time=compute == jnp.bfloat16,
    ),
    side=_FOLDER_SIDE,
    step=None,
    notes=(f"text encoder: {encoder.description}",),
    mesh=mesh,
  )  # fmt: skip


def _roundtrip_fn(vae, variables, image):
  latents = vae.apply(variables, to_unit(image), method="encode")
  return vae.apply(variables, latents, method="decode")


_roundtrip = jax.jit(_roundtrip_fn, static_argnums=0)
