# SPDX-License-Identifier: Apache-2.0
"""Prompts and reference images to images: the sampler around the sampler.

One compiled program per (target size, reference sizes, steps, guidance or
not, batch). Noise is drawn per image from its own seed, so an image does not
depend on its neighbours in the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning.conditioner import Conditioner, stack
from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, schedules
from qi2_jax.models.condition import Layout
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.vae import VAE


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to sample.

  Attributes:
    steps: Euler steps.
    guidance: classifier-free guidance scale; 1 runs no negative branch.
    batch_size: images per compiled call; the last call is padded.
    shift: schedule of the noise levels.
  """

  steps: int = 40
  guidance: float = 1.0
  batch_size: int = 8
  shift: schedules.ShiftConfig = dataclasses.field(
    default_factory=schedules.ShiftConfig
  )


@dataclasses.dataclass(frozen=True)
class Request:
  """One image to make.

  Attributes:
    prompt: text or edit instruction.
    references: uint8 `[h, w, C]` images, sides divisible by 32.
    height: target height in pixels, divisible by the VAE's factor.
    width: target width.
    seed: seed of the starting noise.
    negative: negative prompt, used when guidance is not 1.
  """

  prompt: str
  references: tuple[np.ndarray, ...] = ()
  height: int = 1024
  width: int = 1024
  seed: int = 0
  negative: str = ""

  @property
  def program(self) -> tuple:
    """Requests with equal programs share a compiled call."""
    return (
      self.height, self.width, *(r.shape for r in self.references)
    )  # fmt: skip


def starting_noise(seeds_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Normal noise `[B, *shape]`, row i a function of seed i alone."""
  return jax.vmap(lambda s: jax.random.normal(jax.random.key(s), shape))(
    seeds_B
  )


@functools.partial(
  jax.jit, static_argnames=("model", "vae", "conditioner", "grid", "guided")
)
def _generate(
  params, vae_variables, batch, negative, seeds, sigmas, guidance, *,
  model: MMDiT, vae: VAE, conditioner: Conditioner, grid, guided: bool,
):  # fmt: skip
  """Encodes, samples and decodes one padded batch: `[B, H, W, C]`."""
  cond = conditioner.encode(vae, vae_variables, batch)
  other = None
  if guided:
    # Same images in both branches, so they are encoded once.
    text = conditioner.encode_text(negative)
    layout = Layout(**negative["layout"])
    other = cond.replace(text_BTC=text, layout=layout)
  shape = (grid[0] * grid[1], vae.config.z_dim)
  latents = sampler.sample(
    model, {"params": params}, starting_noise(seeds, shape), sigmas, cond,
    other, guidance,
  )  # fmt: skip
  latents = latents.reshape(latents.shape[0], *grid, -1)
  return vae.apply(vae_variables, latents, method="decode")


@dataclasses.dataclass(frozen=True)
class Generator:
  """A model, its VAE and its conditioner, ready to make images."""

  model: MMDiT
  vae: VAE
  conditioner: Conditioner

  def check(self, request: Request) -> None:
    """Raises InputError for sizes that the VAE or the encoder cannot take."""
    factor = self.conditioner.factor
    for reference in request.references:
      height, width = reference.shape[:2]
      if height % (2 * factor) or width % (2 * factor):
        raise InputError(
          f"reference image of {height} x {width} px is not a multiple of "
          f"{2 * factor} px; resize it."
        )
    if request.height % factor or request.width % factor:
      raise InputError(
        f"size {request.height} x {request.width} is not a multiple of "
        f"{factor} px; choose another height and width."
      )

  def __call__(
    self, params, vae_variables, requests: Sequence[Request],
    config: SamplingConfig, progress: Callable[[int], None] = lambda n: None,
  ) -> list[np.ndarray]:  # fmt: skip
    """Makes every request, in order: float32 `[H, W, C]` in [-1, 1].

    Args:
      params: parameters of the model.
      vae_variables: variables of the VAE.
      requests: what to make; sizes may differ.
      config: how to sample.
      progress: called with the number of images finished so far.

    Raises:
      InputError: a size the VAE cannot produce.
    """
    for request in requests:
      self.check(request)
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(request.program, []).append(i)
    images: list = [None] * len(requests)
    done = 0
    for indices in groups.values():
      for start in range(0, len(indices), config.batch_size):
        chosen = indices[start : start + config.batch_size]
        made = self._batch(
          params, vae_variables, [requests[i] for i in chosen], config
        )
        for i, image in zip(chosen, made):
          images[i] = image
        done += len(chosen)
        progress(done)
    return images

  def _batch(self, params, vae_variables, requests, config):
    """Pads to the batch size, runs the compiled program, cuts back."""
    count = len(requests)
    requests = [*requests, *[requests[-1]] * (config.batch_size - count)]
    size = requests[0].height, requests[0].width
    grid = tuple(s // self.conditioner.factor for s in size)
    hosts = [
      self.conditioner.host(r.prompt, r.references, size) for r in requests
    ]
    negatives = [
      self.conditioner.host(r.negative, r.references, size) for r in requests
    ]
    sigmas = schedules.sampling_sigmas(
      config.steps, grid[0] * grid[1], config.shift
    )
    out = _generate(
      params, vae_variables, stack(hosts), stack(negatives),
      np.asarray([r.seed for r in requests], np.uint32), sigmas,
      jnp.float32(config.guidance), model=self.model, vae=self.vae,
      conditioner=self.conditioner, grid=grid, guided=config.guidance != 1.0,
    )  # fmt: skip
    return list(np.asarray(out)[:count])
