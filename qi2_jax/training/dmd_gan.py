# SPDX-License-Identifier: Apache-2.0
"""The GAN head of a distillation (DMD2, arXiv 2405.14867, section 4.3).

A small head on hidden states of the fake score tells noisy images of the data
from noisy samples of the student. Its loss also trains the fake score, which
therefore is one model with two tasks, and the student is pulled to where the
head sees images. DMD2 puts convolutions on the middle of a U-Net; here it is
an MLP on the mean of the target's tokens behind the last block, which is ours.

Head and fake score are one tree under one optimizer: `{SCORE, HEAD}` in the
place of the score alone. Without the head nothing differs from before it.

Shapes: B examples of one group, N tokens, D width, Z channels.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qi2_jax.conditioning.conditioner import encode_images
from qi2_jax.errors import InputError
from qi2_jax.flow import path
from qi2_jax.models import layers
from qi2_jax.objectives import dmd, dmd_gan, flow_matching
from qi2_jax.training import cached, frozen
from qi2_jax.training.dmd_draws import noisy
from qi2_jax.training.task import Sample

SCORE, HEAD = "score", "head"
# The head is small: every device has a copy.
SHARDING_RULES = ((rf"(.*/)?{HEAD}/\w+/(kernel|bias)", ()),)
_HIDDEN = 256  # ours


@dataclasses.dataclass(frozen=True)
class GanConfig:
  """How much the head counts.

  Attributes:
    weight: of the student's term beside its DMD loss.
    fake_weight: of the head's loss beside the fake score's.
  """

  weight: float
  fake_weight: float


def from_config(section) -> GanConfig | None:
  """`config.dmd.gan`, or None where there is no head.

  Args:
    section: `config.dmd`; one of an older release has no `gan`.

  Raises:
    InputError: a weight without meaning.
  """
  gan = section.get("gan")
  if not gan or gan.weight == 0.0:
    return None
  if gan.weight < 0.0 or gan.fake_weight <= 0.0:
    raise InputError(
      f"config.dmd.gan.weight={gan.weight} and "
      f"fake_weight={gan.fake_weight} must be above 0, or weight 0 for a run "
      "without a GAN head."
    )
  return GanConfig(gan.weight, gan.fake_weight)


class Head(nn.Module):
  """Hidden states to a logit."""

  @nn.compact
  def __call__(self, h_BND) -> jax.Array:
    """`[B, N, D]` to fp32 `[B]`, zero at the start."""
    x = layers.layer_norm(h_BND, 1e-6).mean(axis=1)
    x = nn.silu(nn.Dense(_HIDDEN, name="hidden")(x))
    zeros = nn.initializers.zeros
    return nn.Dense(1, kernel_init=zeros, name="logit")(x)[:, 0]


def new_head(width: int) -> dict:
  """Fresh parameters of a head, the same in every run.

  Args:
    width: D of the hidden states.
  """
  h = jnp.zeros((1, 1, width))
  return Head().init(jax.random.key(0), h)["params"]


def parts(config, fake):
  """`(fake score, head or None)` of the state's `fake`.

  Args:
    config: see `dmd_step.DmdConfig`.
    fake: see `dmd_state.DmdState`.
  """
  return (fake, None) if config.gan is None else (fake[SCORE], fake[HEAD])


def judge(hidden: Callable, params, head, x_t, t_B, condition):
  """`(velocity, logit_B)` of the fake score and the head at noisy samples.

  Args:
    hidden: see `dmd_step.Networks`.
    params: of the fake score.
    head: parameters of the head.
    x_t: noisy samples `[B, N, Z]`.
    t_B: their noise levels.
    condition: of their prompts.
  """
  v, h_BND = hidden(params, x_t, t_B, condition)
  return v, Head().apply({"params": head}, h_BND)


def fake_loss(config, hidden: Callable, params, head, x0, rows, keys):
  """`dmd_step.fake_loss` plus the head's, of one look at the samples.

  Images and samples have the same noise levels and prompts.

  Args:
    config: see `dmd_step.DmdConfig`.
    hidden: see `dmd_step.Networks`.
    params: of the fake score.
    head: parameters of the head.
    x0: samples of the student `[B, N, Z]`.
    rows: `condition` and `target_BNZ`, latents of images.
    keys: see `dmd_draws.draws`.

  Returns:
    `(loss, metrics)`.
  """
  x0, condition = jax.lax.stop_gradient(x0), rows["condition"]
  t_B = dmd.draw_times(keys["times"], x0.shape[0], config.fake_times)
  x_t, eps = noisy(x0, t_B, keys["eps"])
  v, fake_B = judge(hidden, params, head, x_t, t_B, condition)
  match = flow_matching.velocity_mse(v, path.velocity(x0, eps)).mean()
  real_t, _ = noisy(rows["target_BNZ"], t_B, _other(keys["eps"]))
  _, real_B = judge(hidden, params, head, real_t, t_B, condition)
  loss = dmd_gan.discriminator_loss(real_B, fake_B).mean()
  metrics = {"fake_loss": match, "d_loss": loss}
  metrics |= dmd_gan.verdicts(real_B, fake_B)
  return match + config.gan.fake_weight * loss, metrics


def student_loss(config, hidden: Callable, params, head, x0, condition, keys):
  """The student's term, weighted; its gradient goes to the samples alone.

  Args:
    config: see `dmd_step.DmdConfig`.
    hidden: see `dmd_step.Networks`.
    params: of the fake score.
    head: parameters of the head.
    x0: samples of the student `[B, N, Z]`.
    condition: of their prompts.
    keys: see `dmd_draws.draws`.

  Returns:
    `(loss, metrics)`.
  """
  params, head = jax.lax.stop_gradient((params, head))
  t_B = dmd.draw_times(
    _other(keys["times"]), x0.shape[0], config.fake_times
  )  # fmt: skip
  x_t, _ = noisy(x0, t_B, _other(keys["eps"]))
  _, fake_B = judge(hidden, params, head, x_t, t_B, condition)
  loss = dmd_gan.generator_loss(fake_B).mean()
  return config.gan.weight * loss, {"gan_loss": loss}


def _other(key: jax.Array) -> jax.Array:
  """A key of the head's own: those of a run without it stay as they are."""
  return jax.random.fold_in(key, 1)


def transform(prompt: Callable) -> Callable:
  """`Task.transform` that also keeps the target of a sample.

  Args:
    prompt: that of `prompts.transform`.
  """

  def one(sample: Sample, rng):
    target = sample.get("latents" if cached.is_cached(sample) else "image")
    if target is None:
      raise InputError(
        "the GAN head compares samples with images, but the data has prompts "
        "only; give data with images or set config.dmd.gan.weight=0."
      )
    return prompt(sample, rng) | {"target": target}

  return one


def encoder(models: frozen.Models, prompt: Callable) -> Callable:
  """`Task.encode` that also gives `target_BNZ`, latents of the targets.

  Args:
    models: of the run.
    prompt: that of `prompts.encoder`.
  """

  @jax.jit
  def encode(variables, target):
    if target.ndim == 3:  # cached
      return target.astype(jnp.float32)
    latents = encode_images(models.vae, variables, target)
    return latents.reshape(latents.shape[0], -1, latents.shape[-1])

  def both(batch):
    rest = {k: v for k, v in batch.items() if k != "target"}
    target_BNZ = encode(models.frozen.vae, batch["target"])
    return prompt(rest) | {"target_BNZ": target_BNZ}

  return both
