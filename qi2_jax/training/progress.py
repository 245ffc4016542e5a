# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes: rates of an interval and the line that shows them.

MFU is the model's FLOPs (recomputation not counted) over what the chips could
do at bf16 peak in the same time.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping

import jax

from qi2_jax.models.mmdit_flops import Tokens, step_flops
from qi2_jax.parallel.chips import CHIPS
from qi2_jax.training import build

# Peak bf16 FLOP/s by JAX's device kind. GPUs: NVIDIA's H100 and H200 data
# sheets, SXM, without sparsity.
PEAK_FLOPS = {
  "TPU v5 lite": CHIPS["v5e"].peak_flops,
  "TPU v5e": CHIPS["v5e"].peak_flops,
  "TPU v5": CHIPS["v5p"].peak_flops,
  "TPU v5p": CHIPS["v5p"].peak_flops,
  "TPU v6 lite": CHIPS["v6e"].peak_flops,
  "TPU v6e": CHIPS["v6e"].peak_flops,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Work:
  """What one step processes, over the whole batch.

  Attributes:
    tokens: latent tokens of the targets; 0 where there are none.
    flops: of the model; 0 where they are not known.
    images: 0 where there are as many as rows of the host batch.
  """

  tokens: int = 0
  flops: float = 0.0
  images: int = 0


def work_of(config, features: Mapping) -> Work:
  """Tokens and FLOPs of a step, from the shapes of its features.

  Args:
    config: the run's config.
    features: `{"latents_BNZ", "condition"}` of `flow_task`; features of
      other tasks have no token count. Those of a rollout have an advantage of
      every image that was made.
  """
  if "advantage_B" in features:
    return Work(images=len(features["advantage_B"]))
  if "latents_BNZ" not in features:
    return Work()
  latents, condition = features["latents_BNZ"], features["condition"]
  batch, count, channels = latents.shape
  if config.get("lora") and config.lora.rank:
    # The frozen base needs no gradients of its own: the count is another.
    return Work(batch * count)
  text = condition.text_BTC.shape
  tokens = Tokens(
    target=count, text=text[1], references=condition.references_BRZ.shape[1],
    prefix=condition.layout.source_BP.shape[1],
  )  # fmt: skip
  model = build.mmdit_config(config.model, channels, text[2])
  return Work(batch * count, step_flops(model, tokens, batch).model)


class Meter:
  """Rates since the last reset."""

  def __init__(self, step: int, num_steps: int, mesh):
    """Starts at `step`.

    Args:
      step: completed steps.
      num_steps: length of the run.
      mesh: all devices of the run.
    """
    self._num_steps = num_steps
    kind = mesh.devices.flat[0].device_kind
    self._peak = PEAK_FLOPS.get(kind, 0.0) * mesh.size
    self.reset(step)

  def reset(self, step: int) -> None:
    """Begins a new interval."""
    self._step, self._start, self._waited = step, time.perf_counter(), 0.0
    self._images, self._tokens, self._flops = 0, 0, 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Time in this context is time spent waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def add(self, images: int, work: Work) -> None:
    """Counts one step with a global batch of `images` rows."""
    self._images += work.images or images
    self._tokens += work.tokens
    self._flops += work.flops

  def rates(self, step: int) -> dict[str, float]:
    """The interval up to `step`; what is not known is left out."""
    elapsed = time.perf_counter() - self._start
    per_step = elapsed / max(1, step - self._step)
    rates = {
      "images_per_second": self._images / elapsed,
      "data_wait_fraction": self._waited / elapsed,
      "eta_seconds": (self._num_steps - step) * per_step,
    }
    if self._tokens:
      rates["tokens_per_second"] = self._tokens / elapsed
    if self._peak and self._flops:
      rates["mfu"] = self._flops / elapsed / self._peak
    return rates


def device_memory() -> dict[str, float]:
  """GiB in use on the first local device, where the backend reports it."""
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {
    "device_memory_gib": "bytes_in_use",
    "device_memory_peak_gib": "peak_bytes_in_use",
  }
  return {k: stats[v] / 2**30 for k, v in names.items() if v in stats}


def line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
  """One line for the log; what `values` lacks is left out."""
  eta = int(values["eta_seconds"])
  hours, minutes, seconds = eta // 3600, eta // 60 % 60, eta % 60
  left = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
  shown = (
    ("loss", "loss {:.4f}", 1),
    ("psnr", "psnr {:.2f}", 1),
    ("images_per_second", "{:.1f} img/s", 1),
    ("tokens_per_second", "{:,.0f} tokens/s", 1),
    ("mfu", "MFU {:.1f} %", 100),
    ("device_memory_gib", "{:.1f} GiB", 1),
    ("data_wait_fraction", "data wait {:.1f} %", 100),
  )
  parts = [f"step {step}/{num_steps}"]
  parts += [
    text.format(unit * values[name])
    for name, text, unit in shown
    if name in values
  ]
  return "  ".join([*parts, f"ETA {left}:{seconds:02d}"])
