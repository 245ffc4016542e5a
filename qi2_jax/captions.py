# SPDX-License-Identifier: Apache-2.0
"""Text lengths of a run: what the loader needs to sort captions by length.

A batch of short captions need not be padded to `config.text.length`. With
`config.text.lengths` every one of these lengths is a program of its own, for
every image shape; the padding never changes an image or a loss.
"""

import jax

from data_pipelines.features.check import read_about
from data_pipelines.loader.config import LoaderConfig
from data_pipelines.loader.lengths import TokenCounter, token_counts
from data_pipelines.records import open_dataset
from qi2_jax.conditioning.conditioner import Conditioner
from qi2_jax.errors import InputError
from qi2_jax.parallel import distributed
from qi2_jax.training import cached
from qi2_jax.training.task import Task


def lengths(config) -> tuple[int, ...]:
  """`config.text.lengths`, checked; () where all captions have one length.

  Args:
    config: `config.text`.

  Raises:
    InputError: they do not rise to `config.text.length`.
  """
  found = tuple(config.get("lengths") or ())
  if not found:
    return ()
  if found[-1] != config.length or list(found) != sorted(set(found)):
    raise InputError(
      f"config.text.lengths={found} must rise to config.text.length="
      f"{config.length}; longer captions lose their last words there."
    )
  return found


def counter_of(conditioner: Conditioner) -> TokenCounter:
  """Measures captions as a text encoder reads them."""
  name = cached.prompt_template(conditioner.encoder)
  return TokenCounter(conditioner.prompt_length, name)


def measure(data: LoaderConfig, task: Task) -> TokenCounter | None:
  """Has one process measure captions that no run has measured before.

  What it stores in the dataset folders saves the other processes the work; a
  process that cannot see them does it again.

  Args:
    data: what will be read.
    task: reads the captions.

  Returns:
    The counter for the loader; None where the task reads no caption.
  """
  found = task.conditioner and counter_of(task.conditioner)
  if data.text_lengths and found and jax.process_count() > 1:
    distributed.on_first(lambda: _measure(data, found))
  return found


def _measure(data: LoaderConfig, found: TokenCounter) -> None:
  for path in data.paths:
    if read_about(path) is None:
      dataset = open_dataset(path)
      token_counts(dataset, found, data.threads)
      dataset.close()
