# SPDX-License-Identifier: Apache-2.0
"""Colours in words, for captions; the bounds between them are ours."""

import colorsys
from collections.abc import Sequence

# Hues by the end of their range, in degrees.
_HUES = (
  (15, "red", "红色"), (42, "orange", "橙色"), (70, "yellow", "黄色"),
  (165, "green", "绿色"), (200, "cyan", "青色"), (255, "blue", "蓝色"),
  (290, "purple", "紫色"), (345, "pink", "粉色"), (361, "red", "红色"),
)  # fmt: skip


def name_of(colour: Sequence[int]) -> tuple[str, str]:
  """A colour in English and in Chinese: ('dark blue', '深蓝色').

  Args:
    colour: sRGB, 0 to 255.
  """
  red, green, blue = (int(v) / 255 for v in colour)
  hue, lightness, _ = colorsys.rgb_to_hls(red, green, blue)
  chroma = max(red, green, blue) - min(red, green, blue)
  if lightness > 0.94:
    return "white", "白色"
  if lightness < 0.08:
    return "black", "黑色"
  name = ("grey", "灰色")
  if chroma > 0.08:
    name = next(names for end, *names in _HUES if 360 * hue < end)
  if lightness > 0.66:
    return f"light {name[0]}", f"浅{name[1]}"
  if lightness < 0.33:
    return f"dark {name[0]}", f"深{name[1]}"
  return name[0], name[1]
