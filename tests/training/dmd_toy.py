# SPDX-License-Identifier: Apache-2.0
"""A two-dimensional distillation: eight Gaussians, a small network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qi2_jax.flow import path, sampler
from qi2_jax.objectives import dmd
from qi2_jax.training import dmd_state, dmd_step, steps

MODES = 2.0 * np.stack(
  [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=-1
)
STD = 0.2
SIGMAS = (1.0, 0.9, 0.75, 0.5)


def data(key, count: int):
  """Samples of the mixture `[count, 1, 2]`."""
  which, noise = jax.random.split(key)
  centre = jnp.asarray(MODES)[jax.random.randint(which, (count,), 0, 8)]
  return (centre + STD * jax.random.normal(noise, (count, 2)))[:, None]


def init(key, width: int = 128) -> list:
  sizes = (18, width, width, width, 2)
  return [
    {
      # The last layer starts at zero.
      "w": jax.random.normal(k, (i, o)) * (i**-0.5 if o != 2 else 0.0),
      "b": jnp.zeros((1, o)),
    }
    for k, i, o in zip(jax.random.split(key, 4), sizes[:-1], sizes[1:])
  ]


def apply(params, x, sigma_B, condition=None):
  """Velocity at x `[B, 1, 2]`; the condition is added, if there is one."""
  angle = sigma_B[:, None] * jnp.exp(jnp.linspace(0.0, 3.0, 8))[None]
  h = jnp.concatenate([x[:, 0], jnp.sin(angle), jnp.cos(angle)], axis=-1)
  for layer in params[:-1]:
    h = jax.nn.silu(h @ layer["w"] + layer["b"])
  v = (h @ params[-1]["w"] + params[-1]["b"])[:, None]
  return v if condition is None else v + condition[:, None]


def rollout(params, condition):
  return lambda x, sigma: apply(
    params, x, jnp.full((x.shape[0],), sigma), condition
  )


NETS = dmd_step.Networks(
  apply, rollout, lambda trained, frozen: trained,
  lambda condition: (condition.shape[0], 1, 2),
)  # fmt: skip


def config(**fields) -> dmd_step.DmdConfig:
  defaults = {
    "sigmas": SIGMAS, "step_weights": (1.0, 1.0, 1.0, 1.0), "guidance": 1.0,
    "times": dmd.Times(), "fake_times": dmd.Times(), "weight": "x0_norm",
    "decoupled": False,
    "sampler": "euler", "ratio": 5,
    "teacher_weights_MKC": np.ones((1, len(SIGMAS), 2), np.float32),
  }  # fmt: skip
  return dmd_step.DmdConfig(**defaults | fields)


def features(batch: int, teachers) -> dict:
  """Prompts without content."""
  zero = jnp.zeros((batch, 2))
  return {
    "condition": zero, "negative": zero,
    "category_B": jnp.zeros((batch,), jnp.int32),
    steps.FROZEN: {dmd_step.TEACHERS: list(teachers)},
  }  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def teacher(key, count: int = 4000):
  """A network trained by flow matching on the mixture."""
  tx = optax.adam(optax.cosine_decay_schedule(2e-3, count))
  uniform = dmd.Times("uniform", 0.001, 0.999)
  normal = dmd.Times("logit_normal", 0.001, 0.999, std=1.2)

  def loss(params, key):
    keys = jax.random.split(key, 4)
    x0 = data(keys[0], 512)
    eps = jax.random.normal(keys[1], x0.shape)
    t_B = jnp.concatenate(
      [
        dmd.draw_times(keys[2], 410, normal),
        dmd.draw_times(keys[3], 102, uniform),
      ]
    )
    v = apply(params, path.interpolate(x0, eps, t_B), t_B)
    return jnp.mean((v - (eps - x0)) ** 2)

  def step(carry, key):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, key), state, params)
    return (optax.apply_updates(params, updates), state), None

  params = init(key)
  keys = jax.random.split(jax.random.fold_in(key, 9), count)
  return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def optimizers(count: int, ratio: int):
  return tuple(
    optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adam(optax.cosine_decay_schedule(rate, n), b1=0.0, b2=0.99),
    )
    for rate, n in ((1e-3, count), (2e-3, count * ratio))
  )


def distil(params, seed: int, count: int, group: int = 256, **fields):
  """Parameters of the student after `count` updates."""
  settings = config(**fields)
  txs = optimizers(count, settings.ratio)
  step = dmd_step.make_step(settings, NETS, *txs, 0.99)
  state = dmd_state.create(params, params, *txs)
  batch = features(group * (settings.ratio + 1), [params])
  key = jax.random.key(100 + seed)

  @jax.jit
  def run(state):
    one = lambda s, _: (step(s, batch, key)[0], None)  # noqa: E731
    return jax.lax.scan(one, state, None, length=count)[0]

  return run(state).params


@jax.jit
def sample(params, sigmas, key=None):
  """4000 Euler samples `[4000, 2]`."""
  key = jax.random.key(5) if key is None else key
  noise = jax.random.normal(key, (4000, 1, 2))
  velocity = rollout(params, None)
  return sampler.euler_scan(velocity, noise, sigmas)[:, 0]


def few_steps(params, sigmas=SIGMAS):
  return sample(params, jnp.asarray([*sigmas, 0.0]))


@jax.jit
def energy_distance(x, y):
  def mean(a, b):
    return jnp.mean(jnp.linalg.norm(a[:, None] - b[None] + 1e-12, axis=-1))

  n = len(x)
  return 2 * mean(x, y) - (mean(x, x) + mean(y, y)) * n / (n - 1)


def judge(x) -> tuple[float, float, float]:
  """Energy distance to the data, share within 4 deviations of a mode, and
  the smallest mode's share of its fair part."""
  truth = data(jax.random.key(77), len(x))[:, 0]
  gaps = np.linalg.norm(np.asarray(x)[:, None] - MODES[None], axis=-1)
  counts = np.bincount(gaps.argmin(axis=1), minlength=8)
  inside = float((gaps.min(axis=1) < 4 * STD).mean())
  distance = float(energy_distance(x, truth))
  return distance, inside, 8 * counts.min() / len(x)
