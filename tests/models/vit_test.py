# SPDX-License-Identifier: Apache-2.0
"""Properties of the shared blocks and of CLIP that need no other library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from qi2_jax.errors import InputError
from qi2_jax.models import clip, siglip, vit

X = np.linspace(-4, 4, 101).astype(np.float32)


@pytest.mark.parametrize("name, formula", [
  ("quick_gelu", X / (1 + np.exp(-1.702 * X))),
  ("gelu", X * (1 + special.erf(X / np.sqrt(2))) / 2),
  (
    "gelu_pytorch_tanh",
    X / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3))),
  ),
])  # fmt: skip
def test_activations_are_their_formulas(name, formula):
  np.testing.assert_allclose(vit.ACTIVATIONS[name](X), formula, atol=2e-6)


def test_cosines_of_unit_vectors():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
  expected = (a @ b.T) / np.outer(
    np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
  )
  found = vit.cosines(vit.unit(jnp.asarray(a)), vit.unit(jnp.asarray(b)))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_end_of_a_text_is_its_first():
  ids = jnp.asarray([[8, 3, 9, 9], [8, 9, 4, 2], [3, 4, 8, 9]])
  np.testing.assert_array_equal(clip.end_of_text(ids, 9), [2, 1, 3])
  np.testing.assert_array_equal(clip.end_of_text(ids, None), [2, 1, 3])
  np.testing.assert_array_equal(clip.end_of_text(ids, 8), [0, 0, 2])


TINY = siglip.PRESETS["tiny"]
STACK = vit.StackConfig(2, 16, 2, 24, "gelu", 1e-5)
SMALL = clip.CLIPConfig(STACK, STACK, 8, 16, 8, 50, 6, 49)


def made(model, init):
  return jax.jit(lambda k: init(model, k))(jax.random.key(0))


def test_what_follows_the_end_of_a_clip_text_is_not_seen():
  model = clip.CLIP(SMALL)
  params = made(model, vit.init_params)
  ids = jnp.asarray([[1, 2, 49, 49, 49, 49], [1, 2, 49, 7, 8, 9],
                     [1, 3, 49, 7, 8, 9]])  # fmt: skip
  out = jax.jit(
    lambda i: model.apply({"params": params}, i, method="embed_texts")
  )(ids)
  np.testing.assert_allclose(out[0], out[1], atol=1e-6)
  assert np.abs(out[1] - out[2]).max() > 1e-3
  np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-6)


def test_bf16_stays_close():
  model = siglip.SigLIP(TINY)
  params = made(model, vit.init_params)
  image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  stack = vit.StackConfig(**vars(TINY.vision) | {"dtype": jnp.bfloat16})
  half = siglip.SigLIP(siglip.SigLIPConfig(**vars(TINY) | {"vision": stack}))
  full, rounded = (
    jax.jit(
      lambda x, m=m: m.apply({"params": params}, x, method="embed_images")
    )(image)
    for m in (model, half)
  )
  assert rounded.dtype == jnp.float32
  assert 0 < np.abs(full - rounded).max() < 0.03


def test_wrong_input_is_named():
  model = clip.CLIP(SMALL)
  with pytest.raises(InputError, match="16 x 16 px"):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, jnp.zeros((1, 2), jnp.int32)),
      jnp.zeros((1, 16, 24, 3)),
    )
  with pytest.raises(InputError, match="7 tokens are too long"):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, jnp.zeros((1, 7), jnp.int32)),
      jnp.zeros((1, 16, 16, 3)),
    )
