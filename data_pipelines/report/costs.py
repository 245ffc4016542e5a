# SPDX-License-Identifier: Apache-2.0
"""What the metrics behind each filter cost, measured on a few records.

The verb *measure* takes all metrics in one pass, so its total does not say
which of them is slow.
"""

import time
from collections.abc import Callable, Iterable

from data_pipelines import codec, images
from data_pipelines.errors import InputError
from data_pipelines.filters import encoded, pixels, rules, text

_GROUPS = {
  "caption": "tokens characters invalid_characters language caption",
  "file": "format source_mode frames orientation orientation_conflict bytes "
  "jpeg_quality sha256",
  "pixels": "entropy contrast sharpness blockiness black_share white_share "
  "flat_share upright transparent_share",
  "fingerprints": "phash dhash thumb",
  "edit": "edit_change edit_similarity",
}
_GROUP_OF = {
  column: group
  for group, columns in _GROUPS.items()
  for column in columns.split()
}
_GROUP_OF_FILTER = {
  "broken": "decode",
  "exact_duplicate": "file",
  "perceptual_duplicate": "fingerprints",
  "decontaminate": "fingerprints",
}


def measure(records: Iterable[codec.Record]) -> dict[str, float]:
  """Milliseconds of CPU per record for each group of metrics.

  Args:
    records: a sample; those that cannot be decoded are left out.

  Returns:
    Group -> mean, empty without records.
  """
  total: dict[str, float] = {}
  count = 0

  def timed(group: str, work: Callable[[], object]) -> object:
    start = time.process_time()
    result = work()
    spent = time.process_time() - start
    total[group] = total.get(group, 0.0) + spent
    return result

  text.caption_metrics("words")  # loads the detector of languages
  for record in records:
    try:
      target, *others = timed(
        "decode",
        lambda r=record: [
          images.decode_image(i) for i in (r.target, *r.references)
        ],
      )
    except InputError:
      continue
    count += 1
    rgb = pixels.on_white(target)
    luma = rgb.convert("L")
    timed("caption", lambda r=record: text.caption_metrics(r.caption))
    timed("file", lambda r=record: encoded.file_metrics(r.target.data))
    timed("pixels", lambda luma=luma: pixels.quality_metrics(luma))
    timed("fingerprints", lambda a=rgb, b=luma: pixels.hash_metrics(a, b))
    timed("edit", lambda a=target, b=others: pixels.edit_metrics(a, tuple(b)))
  return {group: 1000 * spent / count for group, spent in total.items()}


def groups_of(name: str, bounds: Iterable[rules.Bound]) -> list[str]:
  """The groups of metrics that a filter reads, none for scores and sizes."""
  if name in _GROUP_OF_FILTER:
    return [_GROUP_OF_FILTER[name]]
  found = (_GROUP_OF.get(bound.column) for bound in bounds)
  return list(dict.fromkeys(group for group in found if group))
