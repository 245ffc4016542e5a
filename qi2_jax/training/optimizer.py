# SPDX-License-Identifier: Apache-2.0
"""Adam with clipping and warm-up (report Table 2)."""

import optax

from qi2_jax.errors import InputError

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(
  peak: float, schedule: str, warmup_steps: int, num_steps: int
) -> optax.Schedule:
  """Linear warm-up, then constant or decay to zero at `num_steps`.

  Raises:
    InputError: unknown schedule.
  """
  if schedule not in SCHEDULES:
    raise InputError(
      f"optimizer.schedule={schedule!r} is unknown; use one of "
      f"{list(SCHEDULES)}."
    )
  rest = max(1, num_steps - warmup_steps)
  body = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, rest),
    "linear": optax.linear_schedule(peak, 0.0, rest),
  }[schedule]
  if warmup_steps == 0:
    return body
  ramp = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([ramp, body], [warmup_steps])


def create(config, num_steps: int) -> optax.GradientTransformation:
  """Global-norm clip, then Adam with decoupled weight decay.

  Args:
    config: `config.optimizer`: learning_rate, schedule, warmup_steps, b1, b2,
      weight_decay, clip_norm.
    num_steps: length of the run, for the schedule.
  """
  schedule = learning_rate(
    config.learning_rate, config.schedule, config.warmup_steps, num_steps
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    ),
  )
