# SPDX-License-Identifier: Apache-2.0
"""`Task.encode` of the stages that learn from rewards.

Images are made with the policy of the state and judged in threads while the
device makes the next part of the batch. Randomness follows the step number;
weights of rewards and the spread of prompts travel in the checkpoint's meta: a
resumed run goes on exactly.

Shapes: P prompts, K images of a prompt, B = P K images.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.errors import InputError
from qi2_jax.models import vae_tiling
from qi2_jax.parallel import distributed
from qi2_jax.training import (
  frozen,
  grpo_loss,
  prompt_choice,
  prompts,
  rollout,
  rollout_rewards,
  steps,
)

# Keeps the rollout's randomness apart from that of the step.
_STREAM = 0x5D1


def check(config, mesh) -> None:
  """Raises InputError for a run that cannot start; reads no model."""
  if not config.init:
    raise InputError(
      "reinforcement learning needs a model: pass --config.init, a workdir or "
      "a pipeline folder."
    )
  section = config.rl
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = [r.batch_size for r in config.data.resolutions.values()]
  for size in (config.data.batch_size, *sizes):
    used = size // section.candidates
    if size % section.candidates or used % (section.parts * shards):
      raise InputError(
        f"a batch of {size} prompts / config.rl.candidates="
        f"{section.candidates} must split into config.rl.parts="
        f"{section.parts} times {shards} devices; change one of them."
      )
    images = used * section.group
    if images % (section.updates * config.optimizer.accumulate * shards):
      raise InputError(
        f"{images} images of a step do not split into config.rl.updates="
        f"{section.updates} x config.optimizer.accumulate="
        f"{config.optimizer.accumulate} parts over {shards} devices."
      )


def transform(conditioner) -> Callable:
  """`Task.transform`: prompt, empty prompt, and what rewards need."""
  pair = prompts.transform(conditioner)
  return lambda sample, rng: (
    pair(sample, rng) | rollout_rewards.host_fields(sample)
  )


class Rollouts:
  """`Task.encode`: prompts on the mesh to features of the step."""

  def __init__(
    self, config, models: frozen.Models, judge: rollout_rewards.Judge,
    run: Callable, finish: Callable, mesh,
  ):  # fmt: skip
    """Compiles nothing yet.

    Args:
      config: of the run.
      models: its frozen models.
      judge: its rewards.
      run: `(state, condition, negative, key) -> (x0 of B images, rows)`.
      finish: `(state, rows, key) -> rows`, after the last part of a batch.
      mesh: where features lie.
    """
    self._config, self._models, self._mesh = config, models, mesh
    self._judge, self._run, self._finish = judge, run, finish
    self._group = config.rl.group
    self._encode = prompts.encoder(models)
    self._key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
    self._choice = prompt_choice.PromptChoice(config.rl.prompt_floor)

  def record(self) -> dict:
    """`Task.record`."""
    return {
      "rewards": self._judge.record(), "prompts": self._choice.record()
    }  # fmt: skip

  def restore(self, saved: Mapping) -> None:
    """`Task.restore`."""
    self._judge.restore(saved.get("rewards", {}))
    self._choice = prompt_choice.PromptChoice(
      self._config.rl.prompt_floor, saved.get("prompts")
    )

  def __call__(self, train_state, batch) -> dict:
    """Features of one step: rows, advantages, what to log."""
    step = int(train_state.step)
    asked = rollout_rewards.Asked.of(
      distributed.to_host(
        {k: batch[k] for k in ("caption", "kind", "image")}
        | {"prompt": {"references": batch["prompt"]["references"]}}
      )
    )
    batch, asked, names = self._chosen(step, batch, asked)
    key = jax.random.fold_in(self._key, step)
    parts, futures = [], []
    count = self._config.rl.parts
    split = jax.tree.map(lambda x: steps.microbatches(x, count), batch)
    size = batch["image"].shape[1:3]
    for i in range(count):
      part = jax.tree.map(lambda x, i=i: x[i], split)
      found = self._encode(part)
      x0, rows = self._run(
        train_state, found["condition"], found["negative"],
        jax.random.fold_in(key, i),
      )  # fmt: skip
      pixels = _decode(self._models.frozen.vae, x0, size, vae=self._models.vae)
      own = rollout_rewards.Asked(asked.prompts[i::count],
                                  asked.references[i::count])  # fmt: skip
      futures.append(
        self._judge.submit(
          functools.partial(_host_images, pixels), own.repeated(self._group)
        )
      )
      parts.append(rows)
    rows = _joined(parts, self._group)
    rows = self._finish(train_state, rows, jax.random.fold_in(key, count))
    values = self._in_order([future.result() for future in futures])
    return rows | self._judged(values, asked, names)

  def _chosen(self, step: int, batch, asked: rollout_rewards.Asked):
    """The prompts to use, of the candidates that the loader brought."""
    names = [
      prompt_choice.name_of(prompt.text, sources)
      for prompt, sources in zip(asked.prompts, asked.references)
    ]
    count = len(names) // self._config.rl.candidates
    if count == len(names):
      return batch, asked, names
    rng = np.random.default_rng([self._config.seed, _STREAM, step])
    at = self._choice.choose(names, count, rng)
    asked = rollout_rewards.Asked(
      [asked.prompts[i] for i in at], [asked.references[i] for i in at]
    )
    return _take(batch, at), asked, [names[i] for i in at]

  def _in_order(self, values: list[dict]) -> dict[str, np.ndarray]:
    """Values of the parts as those of the batch, prompts in their order."""
    group = self._group
    return {
      name: np.stack(
        [part[name].reshape(-1, group) for part in values], axis=1
      ).ravel()
      for name in values[0]
    }

  def _judged(self, values, asked, names) -> dict:
    """Advantages and what to log, on the mesh."""
    group = self._group
    kinds = [prompt.kind for prompt in asked.prompts]
    rows, log = self._judge.advantages(values, kinds, group)
    self._choice.learn(
      names, np.stack([v.reshape(-1, group) for v in values.values()])
    )
    place = lambda v: rollout.to_rows(v, self._mesh)  # noqa: E731
    return jax.tree.map(place, rows | {grpo_loss.LOG: log})


@functools.partial(jax.jit, static_argnames=("size", "vae"))
def _decode(variables, x_BNZ, size, *, vae):
  """Latents to images `[B, H, W, C]` in [-1, 1]."""
  factor = vae.config.factor
  grid = size[0] // factor, size[1] // factor
  z_BhwZ = x_BNZ.reshape(x_BNZ.shape[0], *grid, -1)
  return vae_tiling.decode(vae, variables, z_BhwZ)


def _host_images(pixels) -> np.ndarray:
  return to_uint8(distributed.to_host(pixels))


@functools.partial(jax.jit, static_argnums=1)
def _joined(parts: list[dict], group: int) -> dict:
  """Rows of the parts of a batch as those of the batch; undoes the split."""

  def one(path, *xs):
    # Parts hold every count-th prompt; references may have no elements.
    each = 1 if path[0].key == rollout.PROBE else group
    images, rest = xs[0].shape[0], xs[0].shape[1:]
    xs = [x.reshape(images // each, each, *rest) for x in xs]
    whole = jnp.stack(xs, axis=1)
    return whole.reshape(len(xs) * images, *rest)

  return jax.tree_util.tree_map_with_path(one, *parts)


@jax.jit
def _take(batch, at):
  return jax.tree.map(lambda x: x[at], batch)
