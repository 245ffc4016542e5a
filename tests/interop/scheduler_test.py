# SPDX-License-Identifier: Apache-2.0
"""Scheduler configs against diffusers' own scheduler."""

import json

import numpy as np
import pytest

from qi2_jax.errors import InputError
from qi2_jax.flow.schedules import sampling_sigmas
from qi2_jax.interop import scheduler

# The values of Qwen-Image-2.1 that differ from diffusers' defaults.
PUBLISHED = {
  "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192,
  "shift_terminal": 0.02,
}  # fmt: skip


def test_schedulers_equal_diffusers(tmp_path):
  diffusers = pytest.importorskip("diffusers")
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(**PUBLISHED)
  theirs.save_pretrained(tmp_path)
  path = tmp_path / "scheduler_config.json"
  shift = scheduler.shift_config(json.loads(path.read_text()))
  tokens, steps = 4096, 12
  mu = 0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256)
  for config in (dict(theirs.config), scheduler.published(shift)):
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    made = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    made.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(
      sampling_sigmas(steps, tokens, shift), made.sigmas.numpy(), atol=1e-6
    )
  turbo = scheduler.published(None)
  made = diffusers.FlowMatchEulerDiscreteScheduler.from_config(turbo)
  assert scheduler.shift_config({"_class_name": scheduler.CLASS,
                                 **made.config}) is None  # fmt: skip
  made.set_timesteps(sigmas=[1.0, 0.7, 0.4])
  np.testing.assert_allclose(made.sigmas.numpy(), [1, 0.7, 0.4, 0], atol=1e-6)


@pytest.mark.parametrize(
  "field, value",
  [
    ("use_karras_sigmas", True), ("use_exponential_sigmas", True),
    ("use_beta_sigmas", True), ("stochastic_sampling", True),
    ("invert_sigmas", True), ("time_shift_type", "linear"),
    ("num_train_timesteps", 500), ("new_trick", 3),
    ("_class_name", "EulerDiscreteScheduler"), ("base_shift", None),
  ],
)  # fmt: skip
def test_unsupported_schedulers_are_named(field, value):
  good = scheduler.published(scheduler.ShiftConfig())
  with pytest.raises(InputError, match=str(value) if field == "_class_name"
                     else field):  # fmt: skip
    scheduler.shift_config({**good, field: value})
  static = {**scheduler.published(None), "shift": 3.0}
  with pytest.raises(InputError, match=r"shift=3\.0"):
    scheduler.shift_config(static)
  with pytest.raises(InputError, match=r"shift_terminal=0\.02"):
    scheduler.shift_config({**static, "shift": 1.0, "shift_terminal": 0.02})


def test_sample_sigmas_are_validated():
  read = scheduler.sample_sigmas
  assert read({}) is None and read({"sample_sigmas": None}) is None
  assert read({"sample_sigmas": [1.0, 0.5]}) == (1.0, 0.5)
  for bad in ([], [0.5, 0.5], [1.0, 0.0], [1.1, 0.5], ["a"], 3, [True]):
    with pytest.raises(InputError, match="decreasing"):
      read({"sample_sigmas": bad})
