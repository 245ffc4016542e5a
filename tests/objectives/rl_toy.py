# SPDX-License-Identifier: Apache-2.0
"""Eight Gaussians in the plane and a policy that starts at their exact flow.

The policy is the exact velocity with a small network whose last layer starts
at zero: it moves the weights of the modes and adds to the velocity. Nothing
needs pre-training, and every start is the same. Classes are the upper and the
lower half; class 2 is unconditional. The reward is 1 on the right-hand side.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qi2_jax.flow import path, sampler, sde
from qi2_jax.objectives import advantages, flow_grpo, nft, opd

ANGLES = np.pi / 8 + np.arange(8) * np.pi / 4
MODES = 2.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
STD = 0.2
NONE = 2
TOP = np.arange(8) < 4
MEMBERS = np.stack([TOP, ~TOP, np.ones(8, bool)])
TRAIN = np.linspace(1, 0, 11, dtype=np.float32)
TEST = np.linspace(1, 0, 41, dtype=np.float32)
KERNEL = sde.Kernel("flow", 0.7)


def exact(x, t_B, class_B, change=0.0):
  """E[eps - x0 | x_t] of each row's class; `change` [B, 8] of the logits."""
  t = t_B[:, None]
  var = (1 - t) ** 2 * STD**2 + t**2
  gap = x[:, None] - (1 - t[..., None]) * jnp.asarray(MODES, jnp.float32)[None]
  logits = -0.5 * jnp.sum(gap**2, axis=-1) / var + change
  logits = jnp.where(jnp.asarray(MEMBERS)[class_B], logits, -jnp.inf)
  share = jax.nn.softmax(logits)[..., None]
  slope = (t - (1 - t) * STD**2) / var
  each = -jnp.asarray(MODES, jnp.float32)[None] + slope[..., None] * gap
  return jnp.sum(share * each, axis=1)


def init(key, width: int = 64) -> list:
  sizes = (2 + 16 + 3, width, width, 10)
  return [
    {
      "w": jax.random.normal(k, (i, o)) * (i**-0.5 if o != 10 else 0.0),
      "b": jnp.zeros((1, o)),
    }
    for k, i, o in zip(jax.random.split(key, 3), sizes[:-1], sizes[1:])
  ]


def apply(params, x, t_B, class_B):
  angle = t_B[:, None] * jnp.exp(jnp.linspace(0.0, 3.0, 8))[None]
  which = jax.nn.one_hot(class_B, 3)
  h = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle), which], axis=-1)
  for layer in params[:-1]:
    h = jax.nn.silu(h @ layer["w"] + layer["b"])
  change = h @ params[-1]["w"] + params[-1]["b"]
  return exact(x, t_B, class_B, change[:, 2:]) + change[:, :2]


def reward(x):
  return (x[:, 0] > 0).astype(jnp.float32)


def classes(count: int, conditional: bool):
  """Half of each class, as two groups; or all unconditional, one group."""
  if not conditional:
    return jnp.full(count, NONE)
  return jnp.repeat(jnp.arange(2), count // 2)


def rollout(hybrid, guidance, params, class_B):
  """Velocity of the sampler; beside it the unconditional one."""

  def velocity(x, sigma):
    t_B = jnp.full(len(x), sigma)
    c = apply(params, x, t_B, class_B)
    if hybrid == "none":
      return c, jnp.zeros_like(c)
    u = apply(params, x, t_B, jnp.full_like(class_B, NONE))
    return flow_grpo.rollout_velocity(hybrid, c, u, guidance), u

  return velocity


def grpo_loss(
  params, key, *, hybrid, guidance, config, conditional, sign, reference
):
  """One rollout and its surrogate."""
  class_B = classes(256, conditional)
  keys = jax.random.split(key)
  noise = jax.random.normal(keys[0], (256, 2))
  frozen = jax.lax.stop_gradient(params)
  walk = sde.walk(
    rollout(hybrid, guidance, frozen, class_B), noise, TRAIN, KERNEL, 0, 9,
    keys[1],
  )  # fmt: skip
  groups = 2 if conditional else 1
  rewards = sign * reward(walk.x0).reshape(1, groups, -1)
  advantage, _ = advantages.advantages(
    rewards, jnp.ones((1, groups)), jnp.ones(rewards.shape[1:], bool)
  )
  rows = lambda x: jnp.repeat(x, 9, axis=0)  # noqa: E731
  steps = flow_grpo.transitions(walk)
  at = steps.x, steps.sigma_B, rows(class_B)
  none = jnp.full_like(at[2], NONE)
  c = apply(params, *at)
  u = apply(params, *at[:2], none) if hybrid == "full" else None
  cached = walk.extras.reshape(-1, 2)
  v = flow_grpo.policy_velocity(hybrid, c, u, cached, guidance)
  new = flow_grpo.score(KERNEL, v, steps)
  ref = None
  if config.kl_weight:
    ref = flow_grpo.score(KERNEL, apply(reference, *at), steps)
  loss, _ = flow_grpo.policy_loss(
    config, steps, new, jax.lax.stop_gradient(new), rows(jnp.ravel(advantage)),
    ref,
  )  # fmt: skip
  return loss.mean()


def descend(loss, params, count: int, key, rate: float):
  """Adam with a falling rate on a loss of `(params, key)`."""
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(rate, count)),
  )

  @jax.jit
  def run(params):
    def one(carry, key):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, key)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    start = params, tx.init(params)
    (params, _), values = jax.lax.scan(one, start, jax.random.split(key, count))
    return params, values

  return run(params)


def grpo(
  seed: int, *, hybrid="none", guidance=1.0, count=150, conditional=False,
  sign=1.0, rate=4e-4, **config,
):  # fmt: skip
  """Trained parameters."""
  start = init(jax.random.key(seed))
  loss = functools.partial(
    grpo_loss, hybrid=hybrid, guidance=guidance,
    config=flow_grpo.GrpoConfig(**config), conditional=conditional, sign=sign,
    reference=start,
  )  # fmt: skip
  return descend(loss, start, count, jax.random.key(100 + seed), rate)[0]


def old_policy_step(old, params, step):
  decay = nft.old_decay(step)
  return jax.tree.map(lambda o, p: decay * o + (1 - decay) * p, old, params)


def nft_train(
  seed: int, count: int = 150, negative: bool = True, rate: float = 1e-3,
  beta: float = 1.0,
):  # fmt: skip
  """Parameters after DiffusionNFT; without the negative term on request."""
  tx = optax.adam(rate)
  class_B = classes(256, False)

  def loss_fn(params, old, key):
    keys = jax.random.split(key, 3)
    noise = jax.random.normal(keys[0], (256, 2))
    velocity = rollout("none", 1.0, jax.lax.stop_gradient(old), class_B)
    x0 = sampler.euler_scan(lambda x, s: velocity(x, s)[0], noise, TRAIN)
    advantage, _ = advantages.advantages(
      reward(x0)[None, None], jnp.ones((1, 1)), jnp.ones((1, 256), bool)
    )
    r_B = nft.optimality(jnp.ravel(advantage), 1.0)
    t_B = jax.random.uniform(keys[1], (256,), minval=0.02, maxval=1.0)
    x_t = path.interpolate(x0, jax.random.normal(keys[2], x0.shape), t_B)
    v, v_old = (apply(p, x_t, t_B, class_B) for p in (params, old))
    if negative:
      return nft.data_loss(x_t, x0, t_B, v, v_old, r_B, beta).mean()
    target = (x_t - x0) / t_B[:, None]
    return (r_B * opd.velocity_loss(v, target)).mean()

  @jax.jit
  def run(params):
    def one(carry, given):
      params, old, state = carry
      step, key = given
      grads = jax.grad(loss_fn)(params, old, key)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return (params, old_policy_step(old, params, step), state), None

    start = params, params, tx.init(params)
    keys = jax.random.split(jax.random.key(200 + seed), count)
    return jax.lax.scan(one, start, (jnp.arange(count), keys))[0][0]

  return run(init(jax.random.key(seed)))


def samples(params, class_B, guidance=None, sigmas=TEST, key=7):
  """ODE samples, with guidance on request."""
  hybrid = "none" if guidance is None else "full"
  velocity = rollout(hybrid, guidance, params, class_B)
  noise = jax.random.normal(jax.random.key(key), (len(class_B), 2))
  return sampler.euler_scan(lambda x, s: velocity(x, s)[0], noise, sigmas)


def judge(x, class_B):
  """Reward, share within 4 STD of a mode of the class, shares of all modes."""
  gaps = np.linalg.norm(np.asarray(x)[:, None] - MODES[None], axis=-1)
  own = np.where(MEMBERS[np.asarray(class_B)], gaps, np.inf)
  shares = np.bincount(gaps.argmin(axis=1), minlength=8) / len(gaps)
  inside = float((own.min(axis=1) < 4 * STD).mean())
  return float(reward(x).mean()), inside, shares
