# SPDX-License-Identifier: Apache-2.0
"""The device half of a rollout: conditions to images and trajectories.

Sampling runs once per batch with the prefix cache; what the update needs of
it stays on the mesh, latents of the trained steps only.

Shapes: P prompts, K images of a prompt, B = P K images, the images of a prompt
together, W stochastic steps, N tokens, Z channels.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.flow import sampler, schedules, sde
from qi2_jax.models import lora, mmdit
from qi2_jax.objectives import flow_grpo
from qi2_jax.parallel import sharding

# The first trained state of one image of each prompt, with the condition of
# the empty prompt: P rows, where the unconditional velocity is watched.
PROBE = "probe"


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How images are made for training.

  Attributes:
    group: K.
    steps: of the sampler; fewer than in use (denoising reduction).
    guidance: w.
    hybrid: see `flow_grpo.HYBRIDS`.
    kernel: of the stochastic steps.
    window: W, number of stochastic steps, all of which are trained.
    window_low: first step that may be stochastic.
    window_high: first step that may not.
    shared_noise: the images of a prompt start from one noise.
    shift: of the noise levels.
  """

  group: int
  steps: int
  guidance: float
  hybrid: str
  kernel: sde.Kernel
  window: int
  window_low: int
  window_high: int
  shared_noise: bool
  shift: schedules.ShiftConfig | None

  def __post_init__(self):
    """Raises InputError for rollouts that teach nothing."""
    flow_grpo.check_hybrid(self.hybrid)
    sde.check_window(self.window_low, self.window_high, self.window, self.steps)
    if self.group < 2:
      raise InputError(
        f"config.rl.group={self.group} must be at least 2: images of one "
        "prompt are compared."
      )
    if self.kernel.level == 0:
      raise InputError("config.rl.level must be above 0: steps are drawn.")

  @property
  def guided(self) -> bool:
    """Whether the rollout has an unconditional branch."""
    return self.hybrid != "none"


def velocity(
  config: RolloutConfig, module: mmdit.MMDiT, params, condition, negative,
  use_cache: bool = True,
) -> sde.Velocity:  # fmt: skip
  """The rollout's velocity, and beside it the unconditional one.

  Args:
    config: see `RolloutConfig`.
    module: the network.
    params: its parameters; a LoRA may be attached.
    condition: of B images.
    negative: of the empty prompts.
    use_cache: see `sampler.prepare`.
  """
  variables = {"params": params}
  if config.guided:
    condition = _neighbours(condition, negative)
  with lora.beside_kernels():
    prepared = sampler.prepare(
      module, variables, condition, use_cache=use_cache
    )
    predict = sampler.prepared_velocity(module, variables, prepared)

  def plain(x, sigma):
    with lora.beside_kernels():
      return predict(x, sigma), ()

  def guided(x, sigma):
    with lora.beside_kernels():
      both = predict(jnp.repeat(x, 2, axis=0), sigma)
    both = both.reshape(-1, 2, *x.shape[1:])
    c, u = both[:, 0], both[:, 1]
    v = flow_grpo.rollout_velocity(config.hybrid, c, u, config.guidance)
    return v, u.astype(jnp.float32)

  return guided if config.guided else plain


def _neighbours(a, b):
  """Rows of both in turn, on the mesh.

  One block after the other, as the sampler has them, would move rows between
  devices, and the compiler does so by gathering all of them on each.
  """

  def one(x, y):
    # References may have no elements.
    rows = jnp.stack([x, y], axis=1).reshape(2 * len(x), *x.shape[1:])
    return sharding.constrain(rows, "batch", *[None] * (x.ndim - 1))

  return jax.tree.map(one, a, b)


@dataclasses.dataclass(frozen=True)
class OdeConfig:
  """How images are made without guidance and without noise on the way.

  Attributes:
    group: K.
    steps: S of the sampler.
    shared_noise: see `RolloutConfig`.
    shift: of the noise levels.
  """

  group: int
  steps: int
  shared_noise: bool
  shift: schedules.ShiftConfig | None

  def __post_init__(self):
    """Raises InputError for a walk of no step."""
    if self.group < 1 or self.steps < 2:
      raise InputError(
        f"config.rl needs group >= 1 and steps >= 2, not {self.group} and "
        f"{self.steps}."
      )


def ode_program(
  config: OdeConfig, module: mmdit.MMDiT, params_of: Callable
) -> Callable:  # fmt: skip
  """A compiled walk of Euler steps.

  Args:
    config: see `OdeConfig`.
    module: the network.
    params_of: `trained -> params` of the policy.

  Returns:
    `(trained, condition, key) -> (walk, condition of B images)`; the states
    of the walk are those of all S steps and the last.
  """

  @jax.jit
  def run(trained, condition, key):
    own = _repeated(condition, config.group)
    noise, sigmas = _start(config, module, condition, key)
    with lora.beside_kernels():
      predict = sampler.guided_velocity(
        module, {"params": params_of(trained)}, own, None, 1.0
      )  # fmt: skip

    def velocity(x, sigma):
      with lora.beside_kernels():
        return predict(x, sigma), ()

    ode = sde.Kernel("flow", 0.0)
    return sde.walk(velocity, noise, sigmas, ode, 0, config.steps, key), own

  return run


def _repeated(tree, group: int):
  """Rows of prompts as rows of their images, on the mesh."""

  def one(x):
    rows = jnp.repeat(x, group, axis=0)
    return sharding.constrain(rows, "batch", *[None] * (x.ndim - 1))

  return jax.tree.map(one, tree)


def _start(config: RolloutConfig | OdeConfig, module, condition, key):
  """Noise of all images on the mesh, and the noise levels of a walk."""
  prompts, tokens, _ = condition.layout.target_positions_BN3.shape
  shape = (tokens, module.config.latent_channels)
  noise = starting_noise(config, key, prompts, shape)
  noise = sharding.constrain(noise, "batch", None, None)
  return noise, schedules.sampling_sigmas(config.steps, tokens, config.shift)


def starting_noise(config: RolloutConfig | OdeConfig, key, prompts: int, shape):
  """Noise of all images `[B, *shape]`."""
  count = 1 if config.shared_noise else config.group
  noise = jax.random.normal(key, (prompts, count, *shape))
  noise = jnp.broadcast_to(noise, (prompts, config.group, *shape))
  return noise.reshape(-1, *shape)


def program(
  config: RolloutConfig, module: mmdit.MMDiT, params_of: Callable
) -> Callable:  # fmt: skip
  """The compiled rollout.

  Args:
    config: see `RolloutConfig`.
    module: the network.
    params_of: `weights -> params` of the policy.

  Returns:
    `(weights, condition, negative, key) -> (walk, conditions of B images)`;
    the conditions are a dict as `grpo_loss` takes it, with `PROBE` where the
    unconditional velocity is not trained and yet moves.
  """

  @jax.jit
  def run(policy, condition, negative, key):
    own = _repeated(
      {"condition": condition, "negative": negative}, config.group
    )
    keys = jax.random.split(key, 3)
    noise, sigmas = _start(config, module, condition, keys[0])
    start = sde.draw_window(
      keys[1], config.window_low, config.window_high, config.window
    )
    v = velocity(config, module, params_of(policy), *own.values())
    walk = sde.walk(
      v, noise, sigmas, config.kernel, start, config.window, keys[2]
    )
    if config.hybrid != "full":
      del own["negative"]
    if config.hybrid == "frozen_uncond":
      first = lambda x: x.reshape(-1, config.group, *x.shape[1:])[:, 0, 0]  # noqa: E731
      own[PROBE] = {
        "x_PNZ": first(walk.states), "sigma_P": first(walk.sigmas),
        "condition": negative,
      }  # fmt: skip
    return walk, own

  return run


def features(walk: sde.Walk, conditions: dict) -> dict:
  """What the update needs of a rollout, rows of B images."""
  rows = {
    "states_BWNZ": walk.states, "sigmas_BW": walk.sigmas,
    "log_probs_BW": walk.log_probs, **conditions,
  }  # fmt: skip
  if not isinstance(walk.extras, tuple):
    rows["cached_BWNZ"] = walk.extras
  return rows


def to_rows(values: np.ndarray, mesh) -> jax.Array:
  """One number per image, the same on every host, onto the mesh."""
  place = sharding.batch_sharding(mesh)
  values = np.asarray(values, np.float32)
  return jax.make_array_from_callback(
    values.shape, place, lambda index: values[index]
  )
