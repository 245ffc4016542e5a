# SPDX-License-Identifier: Apache-2.0
"""The logistic losses of the GAN head against torch."""

import jax
import numpy as np
import torch
from torch.nn import functional

from qi2_jax.objectives import dmd_gan


def logits():
  rng = np.random.default_rng(0)
  return rng.normal(0.0, 4.0, (2, 12)).astype(np.float32)


def test_losses_and_their_gradients_are_those_of_torch():
  real, fake = logits()
  t_real, t_fake = (torch.tensor(x, requires_grad=True) for x in (real, fake))
  expected = functional.softplus(-t_real) + functional.softplus(t_fake)
  expected.sum().backward()
  loss = lambda *x: dmd_gan.discriminator_loss(*x).sum()  # noqa: E731
  np.testing.assert_allclose(
    dmd_gan.discriminator_loss(real, fake), expected.detach(), rtol=1e-5
  )
  for ours, theirs in zip(jax.grad(loss, (0, 1))(real, fake), (t_real, t_fake)):
    np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-6)
  t_fake = torch.tensor(fake, requires_grad=True)
  expected = functional.softplus(-t_fake)
  expected.sum().backward()
  np.testing.assert_allclose(
    dmd_gan.generator_loss(fake), expected.detach(), rtol=1e-5
  )
  ours = jax.grad(lambda x: dmd_gan.generator_loss(x).sum())(fake)
  np.testing.assert_allclose(ours, t_fake.grad, rtol=1e-4, atol=1e-6)


def test_verdicts_count_what_is_judged_right():
  real = np.asarray([1.0, 2.0, -1.0, 4.0], np.float32)
  fake = np.asarray([-1.0, 3.0, -2.0, 2.0], np.float32)
  made = dmd_gan.verdicts(real, fake)
  assert {k: float(v) for k, v in made.items()} == {
    "d_real": 1.5, "d_fake": 0.5, "d_real_accuracy": 0.75,
    "d_fake_accuracy": 0.5,
  }  # fmt: skip
