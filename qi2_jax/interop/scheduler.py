# SPDX-License-Identifier: Apache-2.0
"""Noise schedules <-> diffusers `FlowMatchEulerDiscreteScheduler` configs."""

import itertools
import math
from collections.abc import Mapping

from qi2_jax.errors import InputError
from qi2_jax.flow.schedules import ShiftConfig
from qi2_jax.interop import published as fields

CLASS = "FlowMatchEulerDiscreteScheduler"
_OFF = (
  "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
  "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip
# diffusers' field and default value <-> our field.
_SHIFT = {
  "base_shift": (0.5, "base_shift"),
  "max_shift": (1.15, "max_shift"),
  "base_image_seq_len": (256, "base_tokens"),
  "max_image_seq_len": (4096, "max_tokens"),
}
_KNOWN = (
  *_OFF, *_SHIFT, "num_train_timesteps", "shift", "use_dynamic_shifting",
  "shift_terminal", "time_shift_type",
)  # fmt: skip


def shift_config(published: Mapping) -> ShiftConfig | None:
  """The shift of a scheduler_config.json; None if levels stay as they are.

  Raises:
    InputError: a setting that the sampler does not implement.
  """
  fields.check_class(published, CLASS)
  fields.check_known(published, _KNOWN)
  for name in _OFF:
    fields.check_value(published, name, (False,))
  fields.check_value(published, "num_train_timesteps", (1000,))
  fields.check_value(published, "time_shift_type", ("exponential",))
  fields.check_value(published, "use_dynamic_shifting", (False, True))
  if not published.get("use_dynamic_shifting", False):
    fields.check_value(published, "shift", (1.0, 1))
    fields.check_value(published, "shift_terminal", (None,))
    return None
  values = {
    ours: published.get(theirs, default)
    for theirs, (default, ours) in _SHIFT.items()
  }
  values["terminal"] = published.get("shift_terminal") or 0.0
  for name, value in values.items():
    if type(value) not in (int, float) or not math.isfinite(value):
      raise InputError(
        f"scheduler_config.json has no usable number for {name} ({value!r}); "
        "download it again."
      )
  if values["base_tokens"] == values["max_tokens"] or not (
    0 <= values["terminal"] < 1
  ):
    raise InputError(
      "scheduler_config.json needs two different image_seq_len values and a "
      "shift_terminal in [0, 1); download it again."
    )
  return ShiftConfig(**values)


def published(shift: ShiftConfig | None) -> dict:
  """A scheduler_config.json with this shift; None switches it off."""
  values = shift or ShiftConfig()
  return {
    "_class_name": CLASS,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": shift is not None,
    **{t: getattr(values, ours) for t, (_, ours) in _SHIFT.items()},
    "shift_terminal": (shift.terminal or None) if shift else None,
    "time_shift_type": "exponential",
    **dict.fromkeys(_OFF, False),
  }


def published_index(sigmas: tuple[float, ...] | None) -> dict:
  """A model_index.json of the public pipeline.

  Args:
    sigmas: levels of a distilled model without the final 0, or None.
  """
  index = {
    "_class_name": "QwenImage21Pipeline",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", CLASS],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
  }
  return index | ({} if sigmas is None else {"sample_sigmas": list(sigmas)})


def sample_sigmas(model_index: Mapping) -> tuple[float, ...] | None:
  """The fixed levels of a distilled model's model_index.json, or None.

  Raises:
    InputError: they are not decreasing numbers in (0, 1].
  """
  found = model_index.get("sample_sigmas")
  if found is None:
    return None
  numbers = isinstance(found, list) and found and all(
    type(s) in (int, float) for s in found
  )  # fmt: skip
  if (
    not numbers
    or not all(0 < s <= 1 for s in found)
    or any(a <= b for a, b in itertools.pairwise(found))
  ):
    raise InputError(
      f"model_index.json has sample_sigmas={found}, which must be decreasing "
      "numbers in (0, 1]; download it again."
    )
  return tuple(float(s) for s in found)
