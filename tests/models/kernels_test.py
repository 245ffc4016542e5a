# SPDX-License-Identifier: Apache-2.0
"""The attention kernels compute one thing, forward and backward.

The TPU kernel runs in Pallas' interpreter; cuDNN is lowered, never run here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.errors import InputError
from qi2_jax.models import kernels, mmdit
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import build

BATCH, PREFIX, TARGET, HEADS, CHANNELS = 2, 70, 90, 2, 128
VALID = np.arange(PREFIX) < np.array([[70], [33]])


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in shapes]


def target_problem():
  """Queries of the target, keys of both streams."""
  q, k, v, g = arrays(
    (BATCH, TARGET, HEADS, CHANNELS),
    *[(BATCH, PREFIX + TARGET, HEADS, CHANNELS)] * 2,
    (BATCH, TARGET, HEADS, CHANNELS),
  )
  valid = jnp.asarray(VALID)
  call = lambda kernel, q, k, v: kernels.target_attention(  # noqa: E731
    kernel, q, k, v, valid
  )
  return call, (q, k, v), g


def prefix_problem():
  """A prefix of text; its padding rows are of no interest."""
  *qkv, g = arrays(*[(BATCH, PREFIX, HEADS, CHANNELS)] * 4)
  valid = jnp.asarray(VALID)

  def call(kernel, q, k, v):
    return kernels.prefix_attention(kernel, q, k, v, None, valid)

  return call, tuple(qkv), g * valid[:, :, None, None]


PROBLEMS = {"target": target_problem, "prefix": prefix_problem}


def value_and_grads(kernel, problem):
  call, qkv, g = problem
  loss = lambda qkv: jnp.sum(call(kernel, *qkv) * g)  # noqa: E731
  return jax.jit(jax.value_and_grad(loss))(qkv)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("spec", [{}, {"data": 2}, {"tensor": 2}, {"seq": 2}])
def test_splash_equals_xla(name, spec, monkeypatch):
  made = functools.partial(kernels.splash.make_splash_mha, interpret=True)
  monkeypatch.setattr(kernels.splash, "make_splash_mha", made)
  problem = PROBLEMS[name]()
  wanted, grads = value_and_grads("xla", problem)
  count = int(np.prod(list(spec.values()), dtype=int))
  mesh = create_mesh(spec, jax.devices()[:count])
  with jax.set_mesh(mesh):
    found, found_grads = value_and_grads("splash", problem)
  assert float(found) == pytest.approx(float(wanted), rel=1e-5)
  for a, b in zip(found_grads, grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_tiles_pad_little():
  for length in (*range(1, 2000, 7), 4144, 4656, 16384, 16896):
    tile = kernels.tile(length)
    assert tile % 128 == 0 and 128 <= tile <= 1024
    assert -length % tile <= max(127, length / 8)
  assert kernels.tile(4096) == 1024


def test_the_best_kernel_of_each_backend():
  best = kernels.best_kernel
  assert best("tpu", 128, jnp.bfloat16) == "splash"
  assert best("tpu", 64, jnp.bfloat16) == "xla"
  assert best("gpu", 128, jnp.bfloat16) == "cudnn"
  assert best("cuda", 64, jnp.float16) == "cudnn"
  assert best("gpu", 128, jnp.float32) == "xla"
  assert best("gpu", 256, jnp.bfloat16) == "xla"
  assert best("cpu", 128, jnp.bfloat16) == "xla"


def test_a_kernel_of_another_backend_is_refused():
  config = mmdit.PRESETS["qwen_image_2_1"]
  assert build.with_kernel(config, platform="tpu").kernel == "splash"
  assert build.with_kernel(config, "xla", "tpu").kernel == "xla"
  with pytest.raises(InputError, match="cudnn does not run here: tpu"):
    build.with_kernel(config, "cudnn", "tpu")
  with pytest.raises(InputError, match=r"model\.kernel='flash' is unknown"):
    build.with_kernel(config, "flash", "tpu")


@pytest.mark.parametrize("name", PROBLEMS)
def test_cudnn_sees_the_valid_keys_first(name, monkeypatch):
  """The call that cuDNN gets, computed by XLA from its arguments."""
  problem = PROBLEMS[name]()
  wanted, grads = value_and_grads("xla", problem)
  real = jax.nn.dot_product_attention

  def xla(*args, implementation, **kwargs):
    assert implementation == "cudnn"
    return real(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
  found, found_grads = value_and_grads("cudnn", problem)
  assert float(found) == pytest.approx(float(wanted), rel=1e-5)
  for a, b in zip(found_grads, grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
