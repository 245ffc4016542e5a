# SPDX-License-Identifier: Apache-2.0
"""The page is well-formed, self-contained, and escapes what it is given."""

import html.parser

import numpy as np
import pytest

from qi2_jax.evaluation import report

_VOID = {"meta", "img", "br", "input", "link"}
_EVIL = '<script>alert("x")</script> & </p>'


class _Balance(html.parser.HTMLParser):
  """Records tags, attributes, and whether every tag is closed in order."""

  def __init__(self):
    super().__init__()
    self.open, self.seen, self.attributes = [], [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append(tag)
    self.attributes += attrs
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.seen.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag


def _page() -> str:
  image = np.zeros((4, 6, 3), np.uint8)
  return report.page(
    _EVIL,
    [_EVIL],
    [
      report.section(
        _EVIL,
        report.paragraph(_EVIL),
        report.note(_EVIL),
        report.code(_EVIL),
        report.table((_EVIL, "b"), [(_EVIL, 1), ("c", report.score(0.5))]),
        report.tiles([(_EVIL, _EVIL, _EVIL)]),
        report.gallery([report.figure(image, _EVIL, True)]),
        report.strips([report.strip([(_EVIL, image)], _EVIL, False)]),
        report.subsection(
          _EVIL, report.curves({_EVIL: ([1, 2], [3.0, 4.0])}, _EVIL, _EVIL)
        ),
      )
    ],
  )


@pytest.fixture(scope="module")
def parsed():
  parser = _Balance()
  parser.feed(_page())
  parser.close()
  return parser


def test_is_well_formed(parsed):
  assert parsed.open == []
  assert {"table", "img", "svg", "h1", "h2", "h3"} <= set(parsed.seen)


def test_escapes_text_everywhere(parsed):
  assert "script" not in parsed.seen


def test_makes_no_requests(parsed):
  for name, value in parsed.attributes:
    if name in ("src", "href", "xlink:href"):
      assert value.startswith(("data:", "#")), value
  assert "@import" not in _page() and "<link" not in _page()


def test_png_keeps_the_pixels_and_shows_alpha_over_white():
  from io import BytesIO

  from PIL import Image

  image = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
  image[0, 0] = 9, 9, 9, 0
  image[1, 1, 3] = 255
  shown = np.asarray(Image.open(BytesIO(report.png(image))))
  assert shown.shape == (5, 7, 3)
  np.testing.assert_array_equal(shown[0, 0], [255, 255, 255])
  np.testing.assert_array_equal(shown[1, 1], image[1, 1, :3])


def test_score_without_a_value_is_a_dash():
  assert report.score(None) == "&ndash;"
  assert "0.40–0.60" in report.score(0.5, (0.4, 0.6))


def test_smoothing_keeps_a_line_and_removes_noise():
  line = np.linspace(0, 1, 200)
  noise = np.random.default_rng(0).normal(size=200)
  smooth = report._smooth(line + noise)
  assert np.abs(smooth - line)[20:-20].max() < np.abs(noise).max() / 2
  np.testing.assert_allclose(report._smooth(np.ones(50)), 1)
