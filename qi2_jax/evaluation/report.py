# SPDX-License-Identifier: Apache-2.0
"""Pieces of one self-contained HTML page: no scripts, no requests.

Every function returns `Markup`. Plain text given to any of them is escaped,
so captions and paths need no care by the caller.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from qi2_jax.evaluation.images import flatten
from qi2_jax.evaluation.style import CSS

_MAX_POINTS = 400
_COLOURS = ("#4f5bd5", "#0e9f8e", "#d9772b", "#b5418e")


class Markup(str):
  """Text that is HTML already."""


Text = str  # plain text, or Markup


def markup(text: Text) -> Markup:
  """Escapes plain text; Markup passes."""
  return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def join(parts: Sequence[Text], between: str = "") -> Markup:
  """Puts pieces one after the other."""
  return Markup(between.join(markup(part) for part in parts))


def tag(name: str, *content: Text, cls: str = "", **attributes: str) -> Markup:
  """One element, e.g. `tag("p", "a < b", cls="note")`."""
  given = ({"class": cls} if cls else {}) | attributes
  shown = "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items())
  return Markup(f"<{name}{shown}>{join(content)}</{name}>")


def page(title: str, lead: Sequence[Text], sections: Sequence[Markup]) -> str:
  """The whole document.

  Args:
    title: of the window and the page.
    lead: paragraphs below the title.
    sections: what `section` returned.
  """
  paragraphs = [tag("p", text, cls="lead") for text in lead]
  head = (
    '<meta charset="utf-8"><meta name="viewport" '
    'content="width=device-width, initial-scale=1">'
    f"<title>{html.escape(title)}</title><style>{CSS}</style>"
  )
  header = tag("header", tag("h1", title), *paragraphs)
  body = tag("main", header, *sections)
  return (
    f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
    f"<body>{body}</body></html>\n"
  )


def section(heading: str, *blocks: Text) -> Markup:
  """A heading with what belongs to it."""
  return tag("section", tag("h2", heading), *blocks)


def subsection(heading: str, *blocks: Text) -> Markup:
  """A smaller heading with what belongs to it."""
  return tag("div", tag("h3", heading), *blocks, cls="sub")


def paragraph(*text: Text) -> Markup:
  """A paragraph."""
  return tag("p", *text)


def note(*text: Text) -> Markup:
  """A paragraph that the reader must not miss."""
  return tag("p", *text, cls="note")


def code(text: str) -> Markup:
  """Lines to copy."""
  return tag("pre", tag("code", text))


def tiles(figures: Sequence[tuple[Text, str, str]]) -> Markup:
  """Big numbers: `(value, label, remark)` each."""
  return tag(
    "div",
    *[
      tag("div", tag("strong", v), tag("span", label), tag("small", remark))
      for v, label, remark in figures
    ],
    cls="tiles",
  )


def fine_print(*text: Text) -> Markup:
  """A paragraph of definitions below a table."""
  return tag("p", *text, cls="fine")


def table(header: Sequence[Text], rows: Sequence[Sequence[Text]]) -> Markup:
  """A table; the first column names the row, the others align right.

  A row named 'mean' or 'total' is set apart.
  """
  head = tag("thead", tag("tr", *[tag("th", cell) for cell in header]))
  body = [
    tag(
      "tr",
      tag("th", row[0]),
      *[tag("td", cell) for cell in row[1:]],
      cls="mean" if row[0] in ("mean", "total") else "",
    )
    for row in rows
  ]
  return tag("div", tag("table", head, tag("tbody", *body)), cls="scroll")


def score(
  value: float | None, interval: tuple[float, float] | None = None
) -> Markup:
  """A share as a number, with a bar and its interval, or a dash."""
  if value is None:
    return Markup("&ndash;")
  parts = [tag("b", f"{value:.2f}")]
  low, high = interval or (value, value)
  if interval:
    parts.append(tag("small", f" {low:.2f}–{high:.2f}"))
  marks = [
    _span("fill", 0, value),
    _span("whisker", low, high) if interval else "",
  ]
  return join([*parts, tag("span", *marks, cls="bar")])


def _span(cls: str, low: float, high: float) -> Markup:
  style = f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"
  return tag("i", cls=cls, style=style)


def picture(image: np.ndarray | bytes, alt: str) -> Markup:
  """An image inside the page.

  Args:
    image: uint8 `[H, W, 3|4]`, or the bytes of a PNG file.
    alt: what it shows, in words.
  """
  data = image if isinstance(image, bytes) else png(image)
  source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
  return Markup(f'<img src="{source}" alt="{html.escape(alt)}">')


def png(image: np.ndarray) -> bytes:
  """PNG bytes of a uint8 image, over white."""
  buffer = io.BytesIO()
  Image.fromarray(flatten(image)).save(buffer, format="PNG")
  return buffer.getvalue()


def figure(
  image: np.ndarray | bytes, caption: str, passed: bool | None = None
) -> Markup:
  """An image with its caption and, where judged, a frame and a mark."""
  return tag(
    "figure", picture(image, caption), tag("figcaption", caption),
    cls=_verdict(passed),
  )  # fmt: skip


def gallery(figures: Sequence[Markup]) -> Markup:
  """Figures side by side, as many to a row as fit."""
  return tag("div", *figures, cls="gallery")


def labelled_gallery(label: Text, figures: Sequence[Markup]) -> Markup:
  """A gallery under a small line that says what it is of."""
  return tag("div", paragraph(tag("small", label)), gallery(figures))


def columns(blocks: Sequence[Markup]) -> Markup:
  """Blocks side by side."""
  return tag("div", *blocks, cls="halves")


def strip(
  cells: Sequence[tuple[str, np.ndarray | bytes]],
  caption: Text,
  passed: bool | None = None,
) -> Markup:
  """Labelled images in one row with a common caption.

  Args:
    cells: `(label, image)`.
    caption: e.g. the instruction.
    passed: judgement of the whole strip, if there is one.
  """
  shown = [
    tag("figure", picture(image, label), tag("figcaption", label))
    for label, image in cells
  ]
  return tag(
    "div", tag("p", caption), tag("div", *shown, cls="cells"),
    cls=f"strip {_verdict(passed)}".strip(),
  )  # fmt: skip


def strips(items: Sequence[Markup]) -> Markup:
  """Strips in columns."""
  return tag("div", *items, cls="strips")


def _verdict(passed: bool | None) -> str:
  return {True: "pass", False: "fail", None: ""}[passed]


def curves(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  x_label: str,
  y_label: str,
) -> Markup:
  """Lines over x as inline SVG; noisy ones also smoothed.

  Args:
    series: name to (xs, ys).
    x_label: with unit.
    y_label: with unit.
  """
  # Not at the top: it takes half a second, which only pages with curves need.
  import matplotlib
  from matplotlib.figure import Figure

  # 'none' keeps text as text, drawn in the page's own font.
  settings = {"svg.fonttype": "none", "svg.hashsalt": y_label}
  with matplotlib.rc_context(settings):
    fig = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes = fig.add_subplot()
    for (name, (xs, ys)), colour in zip(series.items(), _COLOURS):
      xs, ys = _thin(np.asarray(xs, float), np.asarray(ys, float))
      axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
      axes.plot(xs, _smooth(ys), color=colour, linewidth=1.6, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    if len(series) > 1:
      axes.legend(frameon=False)
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True)
  text = buffer.getvalue()
  return tag("div", Markup(text[text.index("<svg") :]), cls="plot")


def _thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  keep = np.linspace(0, len(xs) - 1, min(len(xs), _MAX_POINTS)).astype(int)
  return xs[keep], ys[keep]


def _smooth(ys: np.ndarray) -> np.ndarray:
  """Running mean over a tenth of the curve, shorter at both ends."""
  half = len(ys) // 20
  sums = np.concatenate([[0.0], np.cumsum(ys)])
  index = np.arange(len(ys))
  low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(ys))
  return (sums[high] - sums[low]) / (high - low)
