# SPDX-License-Identifier: Apache-2.0
"""Reads the bars of a chart back."""

import re


def rects(svg, colour):
  pattern = rf'width="([\d.]+)" height="([\d.]+)" fill="{colour}"'
  return [(float(w), float(h)) for w, h in re.findall(pattern, svg)]
