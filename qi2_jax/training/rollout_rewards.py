# SPDX-License-Identifier: Apache-2.0
"""The host half of a rollout: images to advantages, and what to remember.

Prompts reach it as bytes in the batch, since a batch holds only arrays; the
text of a prompt that is longer than `TEXT_BYTES` is refused, not cut.

Shapes: P prompts, K images of a prompt, B = P K images, the images of a prompt
together.
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qi2_jax.errors import InputError
from qi2_jax.evaluation.images import flatten
from qi2_jax.objectives import advantages
from qi2_jax.rewards import composite, protocol, rules, vlm

TEXT_BYTES = 4096
_KIND_BYTES = 32
BUILT_IN = ("rules", "grades", "background")


def to_bytes(text: str, size: int = TEXT_BYTES) -> np.ndarray:
  """UTF-8 of a text, padded with zeros: uint8 `[size]`.

  Raises:
    InputError: it is longer.
  """
  raw = text.encode()
  if len(raw) > size:
    raise InputError(
      f"a prompt or kind of {len(raw)} bytes is longer than {size}: "
      f"{text[:60]!r}...; shorten it."
    )
  return np.frombuffer(raw.ljust(size, b"\0"), np.uint8)


def to_text(raw: np.ndarray) -> str:
  """The text of `to_bytes`."""
  return raw.tobytes().rstrip(b"\0").decode()


def host_fields(sample: dict) -> dict:
  """What rewards need of a loader's sample, as arrays."""
  return {
    "image": sample["image"],
    "caption": to_bytes(sample["caption"]),
    "kind": to_bytes(sample["kind"], _KIND_BYTES),
  }


@dataclasses.dataclass(frozen=True)
class Asked:
  """The prompts of a batch on the host.

  Attributes:
    prompts: one each.
    references: of each prompt.
  """

  prompts: list[protocol.Prompt]
  references: list[tuple[np.ndarray, ...]]

  @classmethod
  def of(cls, batch: Mapping) -> "Asked":
    """From the fields of `host_fields` and the batch's references."""
    sources = batch["prompt"]["references"]
    edits = len(sources) > 0
    prompts = [
      protocol.Prompt(
        to_text(caption), to_text(kind),
        flatten(target) if edits else None,
      )
      for caption, kind, target in zip(
        batch["caption"], batch["kind"], batch["image"]
      )
    ]  # fmt: skip
    references = [
      tuple(flatten(source[i]) for source in sources)
      for i in range(len(prompts))
    ]
    return cls(prompts, references)

  def repeated(self, count: int) -> "Asked":
    """For `count` images of each prompt."""
    return Asked(
      [p for p in self.prompts for _ in range(count)],
      [r for r in self.references for _ in range(count)],
    )


def scores(config, built_in: Mapping[str, protocol.Score]) -> dict:
  """The rewards that `config.rewards` names.

  Args:
    config: `config.rewards`: `use` and `judges`.
    built_in: rewards that the entry point hands over.

  Raises:
    InputError: a reward is unknown, or there is none.
  """
  found = {}
  for name in config.use:
    if name not in built_in:
      raise InputError(
        f"config.rewards.use names {name!r}; use {sorted(built_in)}, and "
        "config.rewards.judges for VLM judges."
      )
    found[name] = built_in[name]
  for name, fields in config.judges.items():
    found[name] = vlm.judge(vlm.JudgeConfig(name=name, **fields.to_dict()))
  if not found:
    raise InputError("config.rewards names no reward; set config.rewards.use.")
  return found


def judge(config, rewards: Mapping[str, protocol.Score]) -> "Judge":
  """The judge of `config.rewards`, see `scores`."""
  return Judge(config, scores(config, rewards))


def built_in(exact: protocol.Score, graded: protocol.Score) -> dict:
  """The rewards without a model, by name, of `rules.rules` and `.grades`."""
  return dict(zip(BUILT_IN, (exact, graded, rules.background)))


class Judge:
  """Rewards, their weights and their failures over a run."""

  def __init__(self, config, found: Mapping[str, protocol.Score]):
    """Starts at the configured weights.

    Args:
      config: `config.rewards`.
      found: of `scores`.
    """
    self._config, self._scores = config, found
    self._pool = concurrent.futures.ThreadPoolExecutor(config.threads)
    self.restore({})

  def restore(self, saved: Mapping) -> None:
    """Goes on from `record()` of a checkpoint; empty: from the start."""
    config = self._config
    table = {k: v.to_dict() for k, v in config.weights.items()}
    self._weights = composite.Weights(
      table, config.adapt_rate, config.adapt_bound, saved.get("factors")
    )
    self._failures = protocol.Failures(
      config.max_failures, saved.get("failures")
    )

  def record(self) -> dict:
    """What a checkpoint must hold, as JSON."""
    return {
      "factors": self._weights.record(), "failures": self._failures.record()
    }  # fmt: skip

  def submit(self, images, asked: Asked) -> concurrent.futures.Future:
    """Scores images in a thread while the device goes on.

    Args:
      images: `() -> uint8 [B, H, W, C]`, called in the thread: it may wait
        for the device.
      asked: one prompt per image.

    Returns:
      A future of `{name: [B]}`.
    """

    def work():
      made = [flatten(image) for image in images()]
      return protocol.score_all(
        self._scores, made, asked.prompts, asked.references
      )

    return self._pool.submit(work)

  def advantages(
    self, values: Mapping[str, np.ndarray], kinds: Sequence[str], group: int
  ) -> tuple[dict, dict]:
    """Advantages of a batch; counts failures and adapts weights.

    Args:
      values: rewards by name, `[B]` each.
      kinds: category of each prompt.
      group: K.

    Returns:
      `({"advantage_B", "weight_B"}, {name: [B]} to log)`.

    Raises:
      InputError: too many images have no reward.
    """
    config = self._config
    valid_GK = self._failures.count(values).reshape(-1, group)
    out, kept = composite.combine(
      values, kinds, valid_GK, self._weights, scale=config.scale,
      clip=config.clip,
    )  # fmt: skip
    weight = np.asarray(advantages.row_weights(kept, valid_GK))
    rows = {"advantage_B": out.ravel(), "weight_B": weight.ravel()}
    ones = np.ones(valid_GK.size)
    log = {
      f"reward_{name}": np.nan_to_num(v, nan=_mean(v))
      for name, v in values.items()
    }
    log["zero_variance"] = np.repeat(1.0 - kept, group)
    log["failed_rewards"] = ones * self._failures.failed
    for name, factor in self._weights.record().items():
      log[f"weight_factor_{name}"] = ones * factor
    return rows, log


def _mean(values: np.ndarray) -> float:
  """Of the finite values; 0 if there are none."""
  finite = values[np.isfinite(values)]
  return float(finite.mean()) if len(finite) else 0.0
