# SPDX-License-Identifier: Apache-2.0
"""The analytic FLOPs against the products in XLA's own program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qi2_jax.models import attention, mmdit, mmdit_flops
from qi2_jax.parallel import hlo, hlo_costs
from tests import tiny_models

CONFIG = mmdit.MMDiTConfig(
  num_layers=3, num_heads=2, head_dim=32, context_dim=24,
  rope_axes=(8, 12, 12), latent_channels=8, remat="none",
)  # fmt: skip


def tokens_of(x, cond):
  """The token counts of real inputs."""
  return mmdit_flops.Tokens(
    target=x.shape[1], text=cond.text_BTC.shape[1],
    references=cond.references_BRZ.shape[1],
    prefix=cond.layout.source_BP.shape[1],
  )  # fmt: skip


def compiled_flops(config, x, cond) -> float:
  """Products of one compiled gradient."""
  module = mmdit.MMDiT(config)
  params = jax.eval_shape(lambda: mmdit.init_params(module, jax.random.key(0)))

  def loss(params, x, sigma, cond):
    return jnp.mean(module.apply({"params": params}, x, sigma, cond) ** 2)

  step = jax.jit(jax.value_and_grad(loss))
  sigma = jnp.full((x.shape[0],), 0.5)
  text = step.lower(params, x, sigma, cond).compile().as_text()
  return hlo_costs.products(hlo.parse(text)).flops


@pytest.mark.parametrize(
  "chunk, fields",
  [
    (1024, {}),
    (1024, {"remat": "full"}),
    (32, {"remat": "full"}),
    (32, {"remat": "dots"}),
    (1024, {"remat": "attention"}),
    (32, {"remat": "attention"}),
    (1024, {"attention": "joint", "condition_time": "shared"}),
    (1024, {"modulation": "per_block", "remat": "full"}),
  ],
)
def test_analytic_count_is_that_of_the_program(chunk, fields, monkeypatch):
  monkeypatch.setattr(attention, "CHUNK", chunk)
  monkeypatch.setattr(mmdit_flops, "CHUNK", chunk)
  config = dataclasses.replace(CONFIG, **fields)
  grid = (8, 12)
  cond = tiny_models.conditioning(
    config, words=(30, 40), references=((4, 6),), target=grid, length=64
  )
  x = tiny_models.noise(config, target=grid)
  work = mmdit_flops.step_flops(config, tokens_of(x, cond), x.shape[0])
  assert compiled_flops(config, x, cond) == pytest.approx(
    work.executed, rel=0.03
  )


def test_parameters_times_tokens_times_six():
  """The textbook estimate, where attention and text are negligible."""
  config = mmdit.PRESETS["qwen_image_2_1"]
  tokens = mmdit_flops.Tokens(target=256, text=0, references=0, prefix=0)
  per_layer = 4 * config.width**2 + 3 * config.width * 3 * config.width
  expected = 6 * per_layer * config.num_layers * tokens.target * 2
  work = mmdit_flops.step_flops(config, tokens, batch=2)
  assert work.model == pytest.approx(expected, rel=0.03)
  assert work.model > expected
