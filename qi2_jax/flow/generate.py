# SPDX-License-Identifier: Apache-2.0
"""Prompts and reference images to images: the sampler around the sampler.

Three compiled programs per (target size, reference sizes, text length,
guidance or not, batch): condition and prefix cache, a few Euler steps, VAE
decoder; any number of steps uses the same ones. Noise is drawn per image
from its own seed, so an image does not depend on its neighbours in the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning.conditioner import Conditioner, Frozen, stack
from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, schedules
from qi2_jax.models import vae_tiling
from qi2_jax.models.condition import Layout
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.vae import VAE
from qi2_jax.parallel import distributed

# Euler steps per call, after each of which progress is reported; ours.
_STEPS_PER_CALL = 4


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to sample.

  Attributes:
    steps: Euler steps.
    guidance: classifier-free guidance scale; 1 runs no negative branch.
    batch_size: images per compiled call; the last call is padded.
    shift: schedule of the noise levels; None leaves them evenly spaced.
    sigmas: noise levels of a distilled model, without the final 0; they take
      the place of `steps`.
    round_time: times as the public bf16 pipeline rounds them.
  """

  steps: int = 40
  guidance: float = 1.0
  batch_size: int = 8
  shift: schedules.ShiftConfig | None = dataclasses.field(
    default_factory=schedules.ShiftConfig
  )
  sigmas: tuple[float, ...] | None = None
  round_time: bool = False

  def levels(self, num_tokens: int) -> np.ndarray:
    """Noise levels for a target of `num_tokens` latents, `[S + 1]`.

    Raises:
      InputError: too few steps.
    """
    if self.sigmas is not None:
      return schedules.shifted_sigmas(self.sigmas, num_tokens, self.shift)
    return schedules.sampling_sigmas(self.steps, num_tokens, self.shift)


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
    noise: starting noise `[h, w, Z]`; takes the place of the seed.
  """

  prompt: str
  references: tuple[np.ndarray, ...] = ()
  height: int = 1024
  width: int = 1024
  seed: int = 0
  negative: str = ""
  noise: np.ndarray | None = None

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


@functools.partial(jax.jit, static_argnames=("model", "conditioner", "guided"))
def _prepare(
  params, frozen, batch, negative, *, model: MMDiT, conditioner: Conditioner,
  guided: bool,
) -> sampler.Prepared:  # fmt: skip
  """Encodes one padded batch and runs its prefix."""
  cond = conditioner.encode(frozen, batch)
  other = None
  if guided:
    # Same images in both branches, so the VAE encodes them once.
    text = conditioner.encode_text(frozen.encoder, negative)
    other = cond.replace(text_BTC=text, layout=Layout(**negative["layout"]))
  return sampler.prepare(model, {"params": params}, cond, other)


@functools.partial(jax.jit, static_argnames=("model", "guided", "round_time"))
def _denoise(
  params, prepared, x_BNZ, sigmas, count, guidance, *, model: MMDiT,
  guided: bool, round_time: bool,
):  # fmt: skip
  """The first `count` Euler steps over `sigmas`."""
  velocity = sampler.prepared_velocity(
    model, {"params": params}, prepared, guidance if guided else None,
    round_time=round_time,
  )  # fmt: skip
  return sampler.euler_some(velocity, x_BNZ, sigmas, count)


@functools.partial(jax.jit, static_argnames=("vae",))
def _decode(variables, z_BhwZ, *, vae: VAE):
  """Normalised latents to images; large ones in tiles without seams."""
  return vae_tiling.decode(vae, variables, z_BhwZ)


@dataclasses.dataclass(frozen=True)
class Generator:
  """A model and its conditioner (encoder, VAE), ready to make images."""

  model: MMDiT
  conditioner: Conditioner

  @property
  def vae(self) -> VAE:
    """The VAE of references and results."""
    return self.conditioner.vae

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
    expected = (*self._grid(request), self.vae.config.z_dim)
    if request.noise is not None and request.noise.shape != expected:
      raise InputError(
        f"the starting noise has shape {request.noise.shape} but an image of "
        f"{request.height} x {request.width} px needs {expected}."
      )

  def _grid(self, request: Request) -> tuple[int, int]:
    factor = self.conditioner.factor
    return request.height // factor, request.width // factor

  def stream(
    self, params, frozen: Frozen, requests: Sequence[Request],
    config: SamplingConfig,
    progress: Callable[[float], None] = lambda n: None,
  ) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Yields `(number of the request, image)` as batches finish.

    Images are float32 `[H, W, C]` in [-1, 1]; requests of one shape come
    together.

    Args:
      params: parameters of the model.
      frozen: variables of encoder and VAE.
      requests: what to make; sizes may differ.
      config: how to sample.
      progress: called with the number of images finished so far; images that
        are being denoised count by their share of the steps.

    Raises:
      InputError: a size, prompt or number of references beyond the models;
        before anything is computed.
    """
    hosts = [self._host(request, config) for request in requests]
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
      length = len(hosts[i][0]["ids"])
      groups.setdefault((length, *request.program), []).append(i)
    done = 0
    for indices in groups.values():
      for start in range(0, len(indices), config.batch_size):
        chosen = indices[start : start + config.batch_size]
        made = self._batch(
          params, frozen, [requests[i] for i in chosen],
          [hosts[i] for i in chosen], config,
          functools.partial(_report_share, progress, done, len(chosen)),
        )  # fmt: skip
        yield from zip(chosen, made)
        done += len(chosen)
        progress(done)

  def __call__(
    self, params, frozen: Frozen, requests: Sequence[Request],
    config: SamplingConfig,
    progress: Callable[[float], None] = lambda n: None,
  ) -> list[np.ndarray]:  # fmt: skip
    """All images of `stream`, in the order of the requests."""
    made = dict(self.stream(params, frozen, requests, config, progress))
    return [made[i] for i in range(len(requests))]

  def _host(self, request: Request, config: SamplingConfig) -> tuple:
    """Checked host arrays of the prompt and of the negative prompt."""
    self.check(request)
    texts = [request.prompt, request.negative]
    if config.guidance == 1.0:
      texts = texts[:1]
    length = max(
      self.conditioner.fitting_length(text, request.references)
      for text in texts
    )
    size = request.height, request.width
    return tuple(
      self.conditioner.host(text, request.references, size, length)
      for text in texts
    )

  def _noise(self, requests: Sequence[Request]) -> jax.Array:
    """Starting noise `[B, N, Z]` from seeds or from the requests."""
    h, w = self._grid(requests[0])
    shape = (h * w, self.vae.config.z_dim)
    seeds = np.asarray([r.seed for r in requests], np.uint32)
    noise = starting_noise(seeds, shape)
    given = [r.noise for r in requests]
    if all(n is None for n in given):
      return noise
    rows = [
      noise[i] if n is None else n.reshape(shape) for i, n in enumerate(given)
    ]
    return jnp.stack(rows).astype(jnp.float32)

  def _batch(self, params, frozen, requests, hosts, config, progress):
    """Pads to the batch size, runs the compiled programs, cuts back."""
    count = len(requests)
    padding = config.batch_size - count
    requests = [*requests, *[requests[-1]] * padding]
    hosts = [*hosts, *[hosts[-1]] * padding]
    guided = config.guidance != 1.0
    batches = [stack(column) for column in zip(*hosts)]
    prepared = _prepare(
      params, frozen, batches[0], batches[1] if guided else None,
      model=self.model, conditioner=self.conditioner, guided=guided,
    )  # fmt: skip
    grid = self._grid(requests[0])
    x = self._noise(requests)
    sigmas = config.levels(grid[0] * grid[1])
    for some, steps, share in _portions(sigmas):
      x = _denoise(
        params, prepared, x, some, steps, jnp.float32(config.guidance),
        model=self.model, guided=guided, round_time=config.round_time,
      )  # fmt: skip
      x.block_until_ready()
      progress(share)
    x = x.reshape(x.shape[0], *grid, -1)
    images = _decode(frozen.vae, x, vae=self.vae)
    return list(distributed.to_host(images)[:count])


def _report_share(progress, done: int, count: int, share: float) -> None:
  """Reports a batch of `count` images that has done `share` of its steps."""
  progress(done + share * count)


def _portions(sigmas: np.ndarray):
  """Cuts `[S + 1]` levels into calls: `(levels, steps, share done)`.

  All have the same length, so that they share one program.
  """
  total = len(sigmas) - 1
  for start in range(0, total, _STEPS_PER_CALL):
    steps = min(_STEPS_PER_CALL, total - start)
    some = np.zeros(_STEPS_PER_CALL + 1, np.float32)
    some[: steps + 1] = sigmas[start : start + steps + 1]
    yield some, np.int32(steps), (start + steps) / total
