# SPDX-License-Identifier: Apache-2.0
"""The generator: padding, neighbours, programs, progress, refusals."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models

from qi2_jax.conditioning.conditioner import Conditioner, Frozen
from qi2_jax.conditioning.encoder import built_in
from qi2_jax.errors import InputError
from qi2_jax.flow import generate
from qi2_jax.flow.generate import Generator, Request, SamplingConfig
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.vae import VAE, init_variables

ENCODER, ENCODER_PARAMS = built_in(width=24)
MODEL = MMDiT(
  dataclasses.replace(tiny_models.MMDIT, latent_channels=4, context_dim=24)
)
PARAMS = tiny_models.mmdit_params(MODEL)
MODULE = VAE(tiny_models.VAE)
CONFIG = SamplingConfig(steps=4, guidance=3.0, batch_size=2)
REFERENCE = np.random.default_rng(2).integers(0, 256, (32, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def frozen():
  shapes = jax.eval_shape(lambda: init_variables(MODULE, jax.random.key(0)))
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  vae = {
    "params": tiny_models.randomise(ones["params"]),
    "latent_stats": {"mean": np.zeros(4), "std": np.ones(4)},
  }
  return Frozen(vae, ENCODER_PARAMS)


def generator(text_length=24):
  return Generator(MODEL, Conditioner(ENCODER, MODULE, text_length))


@pytest.fixture(scope="module")
def make(frozen):
  """`make(requests, config, text_length) -> images`, one per length."""
  made = {n: generator(n) for n in (24, 48)}

  def run(requests, config=CONFIG, text_length=24, **options):
    return made[text_length](PARAMS, frozen, requests, config, **options)

  return run


def request(prompt="a red circle", **fields):
  return Request(prompt, **({"height": 32, "width": 64} | fields))


@pytest.mark.parametrize("references", [(), (REFERENCE,)])
def test_padding_a_prompt_does_not_change_the_image(make, references):
  one = request(references=references, negative="blue")
  short, long = make([one]), make([one], text_length=48)
  assert tiny_models.relative(long[0], short[0]) <= 1e-5


def test_an_image_does_not_depend_on_its_neighbours(make):
  rows = [request(seed=5), request("two blue squares in the sky", seed=6)]
  alone = make(rows[:1])[0]
  together = make(rows)
  assert tiny_models.relative(together[0], alone) <= 1e-5
  assert tiny_models.relative(together[1], alone) > 1e-2


def test_noise_may_be_given(make):
  shape = (2 * 4, 4)
  noise = generate.starting_noise(np.array([7], np.uint32), shape)[0]
  given = request(seed=0, noise=np.asarray(noise).reshape(2, 4, 4))
  expected = make([request(seed=7)])[0]
  np.testing.assert_allclose(make([given])[0], expected, atol=1e-6)
  mixed = make([given, request(seed=3)])
  np.testing.assert_allclose(mixed[0], expected, atol=1e-5)
  np.testing.assert_allclose(mixed[1], make([request(seed=3)])[0], atol=1e-5)


def test_any_number_of_steps_runs_the_same_program(make):
  make([request()])
  before = generate._denoise._cache_size()
  images = [
    make([request()], dataclasses.replace(CONFIG, steps=steps))[0]
    for steps in (2, 5, 9)
  ]
  assert generate._denoise._cache_size() == before
  assert tiny_models.relative(images[0], images[2]) > 1e-3


def test_explicit_levels_take_the_place_of_steps(make):
  even = dataclasses.replace(CONFIG, steps=4, shift=None)
  levels = even.levels(8)
  np.testing.assert_array_equal(levels, np.float32([1, 0.75, 0.5, 0.25, 0]))
  given = dataclasses.replace(even, steps=99, sigmas=(1.0, 0.75, 0.5, 0.25))
  np.testing.assert_array_equal(given.levels(8), levels)
  np.testing.assert_array_equal(
    make([request()], given)[0], make([request()], even)[0]
  )


def test_progress_rises_to_the_number_of_images(make):
  seen = []
  config = dataclasses.replace(CONFIG, steps=10)
  make([request(seed=s) for s in range(3)], config, progress=seen.append)
  assert seen == sorted(seen) and seen[-1] == 3
  assert len(set(seen)) > 3 and 0 < seen[0] < 2


def test_images_come_as_they_are_finished(frozen):
  requests = [request(seed=s) for s in range(3)]
  stream = generator().stream(PARAMS, frozen, requests, CONFIG)
  first, image = next(stream)
  assert first == 0 and image.shape == (32, 64, 3)
  assert [i for i, _ in stream] == [1, 2]


@pytest.mark.parametrize(
  "bad, message",
  [
    ({"height": 33}, "33 x 64 is not a multiple of 16"),
    ({"references": (REFERENCE[:, :48],)}, "not a multiple of 32"),
    ({"references": (REFERENCE,) * 11}, "at most 10"),
    ({"noise": np.zeros((2, 2, 4))}, r"needs \(2, 4, 4\)"),
    ({"prompt": " red" * 9000}, "position table"),
  ],
)
def test_impossible_requests_are_refused_before_any_work(frozen, bad, message):
  bad = request(**bad)
  stream = generator().stream(None, None, [request(), bad], CONFIG)
  with pytest.raises(InputError, match=message):
    next(stream)


def test_bf16_times_are_those_of_the_public_pipeline():
  torch = pytest.importorskip("torch")
  from qi2_jax.flow.sampler import rounded_time

  sigma = np.linspace(0, 1, 1001, dtype=np.float32)
  theirs = torch.tensor(1000 * sigma).to(torch.bfloat16) / 1000
  ours = jax.vmap(rounded_time)(sigma)
  np.testing.assert_array_equal(ours, theirs.float().numpy())
  assert np.abs(ours - sigma).max() > 1e-3
