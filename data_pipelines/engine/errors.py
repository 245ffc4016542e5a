# SPDX-License-Identifier: Apache-2.0
"""When so much of a shard is unusable that something else must be wrong."""

from collections.abc import Sequence

from data_pipelines import reasons as categories
from data_pipelines.errors import InputError


def check_error_rate(
  where: str, bad: int, total: int, limit: float, reasons: Sequence[str]
) -> None:
  """Checks the share of unusable items of a shard.

  Raises:
    InputError: it is above `limit`; the sentence names the commonest reason.
  """
  if not categories.is_excessive(bad, total, limit):
    return
  reason, count = categories.tally(reasons).most_common(1)[0]
  raise InputError(
    f"{bad} of {total} items of {where} are unusable, more than "
    f"config.max_error_rate={limit:g} allows; most often ({count}): {reason}; "
    "repair the input or raise the limit."
  )
