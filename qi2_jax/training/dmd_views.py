# SPDX-License-Identifier: Apache-2.0
"""What a distillation shows and how it measures: student beside teacher."""

import itertools
from collections.abc import Sequence

import numpy as np

from qi2_jax.conditioning.conditioner import to_uint8
from qi2_jax.evaluation.images import grid
from qi2_jax.flow.generate import Generator, Request, SamplingConfig
from qi2_jax.training import best, build, frozen
from qi2_jax.training.task import Sample


class Views:
  """Teacher and student side by side; what the teacher makes is made once."""

  def __init__(self, config, models: frozen.Models, teacher):
    """Keeps what is needed to sample.

    Args:
      config: of the run.
      models: of the run.
      teacher: parameters of the first teacher.
    """
    self._generator = Generator(models.module, models.conditioner)
    self._frozen, self._teacher = models.frozen, teacher
    self._student = build.sampling_config(config)
    section = config.dmd
    self._best_of = section.held_out_samples
    self._prompts = tuple(section.held_out_prompts)
    self._size = tuple(config.data.buckets[0])
    shift = build.shift_config(config.flow.shift)

    def slow(count):
      return SamplingConfig(
        max(count, 2),
        section.teacher_guidance,
        config.sampling.batch_size,
        shift,
      )

    self._slow = slow(section.teacher_steps)
    self._fast = slow(len(section.sigmas))
    self._shown, self._expected = {}, None

  @property
  def measures(self) -> bool:
    """Whether there are held-out prompts."""
    return bool(self._prompts)

  def preview(self, params, samples: Sequence[Sample]):
    """Four rows: references, teacher, teacher in few steps, student."""
    requests = [
      Request(s["caption"], s["references"], *s["image"].shape[:2], seed=i)
      for i, s in enumerate(samples)
    ]
    shapes = tuple(s["image"].shape for s in samples)
    if shapes not in self._shown:
      self._shown[shapes] = [
        self._make(self._teacher, requests, how)
        for how in (self._slow, self._fast)
      ]
    references = [
      s["references"][0] if s["references"] else np.full_like(s["image"], 255)
      for s in samples
    ]
    made = self._make(params, requests, self._student)
    rows = [*references, *itertools.chain(*self._shown[shapes]), *made]
    return {"samples": grid(rows, columns=len(samples))}

  def distance(self, params) -> float:
    """How far the student's samples of held-out prompts are from the
    teacher's: the mean energy distance, in pixels of [-1, 1]."""
    count = self._best_of
    requests = [
      Request(prompt, (), *self._size, seed=i * count + n)
      for i, prompt in enumerate(self._prompts)
      for n in range(count)
    ]
    # Seeds of its own: equal noise would make both sets dependent.
    other = [
      Request(r.prompt, (), *self._size, seed=10**6 + r.seed)
      for r in requests
    ]  # fmt: skip
    if self._expected is None:
      self._expected = self._sets(self._teacher, other, self._slow)
    ours = self._sets(params, requests, self._student)
    return best.mean_distance(ours, self._expected)

  def _make(self, params, requests, how: SamplingConfig):
    made = self._generator(params, self._frozen, requests, how)
    return [to_uint8(image) for image in made]

  def _sets(self, params, requests, how: SamplingConfig):
    """Images by prompt: `[prompts, samples, H, W, C]`."""
    made = np.stack(self._generator(params, self._frozen, requests, how))
    return made.reshape(len(self._prompts), self._best_of, *made.shape[1:])
