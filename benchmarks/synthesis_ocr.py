# SPDX-License-Identifier: Apache-2.0
"""Can a reader read synthetic text, line by line, where the layout says it is?

    python benchmarks/synthesis_ocr.py
    python benchmarks/synthesis_ocr.py --strategies=clean --samples=20 \\
      --json=ocr.json
    python benchmarks/synthesis_ocr.py --languages=ar,th --worst=FOLDER

Every line is cut out by its polygon (with a margin of `--margin` of its
height, as readers expect), made upright and scaled to 48 px for RapidOCR or 40
px for Tesseract, and read alone; a polygon in the wrong place costs letters.
The score is NED, 1 - edit distance / longer length. Compared are NFKC texts
without direction marks; without spaces, too, in languages that have none
between words, because Tesseract adds some. Light letters on dark are inverted
for Tesseract.

`clean` is black text on white, at `--pixels` per em: what is wrong there is
the fault of shaping, order or boxes, or of the reader. The other strategies
are what the dataset holds; their lines of less than `--least` px (the
polygon's shorter side) are not read, and counted. Exit status 1: the mean over
the clean lines of a language is below 0.97 (English and Chinese) or 0.9.

RapidOCR (`pip install rapidocr onnxruntime`) reads English and horizontal
Chinese, Tesseract with its models of the other languages the rest (Debian:
tesseract-ocr-ara, -hin, -jpn, -kor, -tha, -chi-sim-vert).
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unicodedata

import cv2
import numpy as np
import tqdm
from absl import app, flags
from PIL import Image

from data_pipelines.synthesis import generate, typeset, words
from data_pipelines.synthesis.languages import LANGUAGES, Language, language_of
from data_pipelines.synthesis.sample import Rejected, polygon_of
from qi2_jax.evaluation.image_metrics import text_similarity

_BARS = {"en": 0.97, "zh": 0.97}
_OTHER_BAR = 0.9
# Tesseract's model and page mode: 7 is one line, 5 a vertical block, 13 a line
# as it is (with 7, Tesseract finds no line in some bold Arabic).
_TESSERACT = {
  "ar": ("ara", 13), "hi": ("hin", 7), "ja": ("jpn", 7), "ko": ("kor", 7),
  "th": ("tha", 7), "zh-vertical": ("chi_sim_vert", 5),
}  # fmt: skip
_HEIGHTS = {"RapidOCR": 48, "Tesseract": 40}
_SIZE = (768, 512)

flags.DEFINE_list(
  "strategies", ["clean", *generate.STRATEGIES], "What is read."
)
flags.DEFINE_list("languages", list(LANGUAGES), "Languages.")
flags.DEFINE_integer("samples", 8, "Images per strategy and language.")
flags.DEFINE_integer("pixels", 40, "Pixels per em of clean lines.")
flags.DEFINE_integer("least", 20, "Smallest height in pixels that is read.")
flags.DEFINE_float("margin", 0.15, "Around a line, in its height.")
flags.DEFINE_integer("seed", 0, "Changes every image.")
flags.DEFINE_string("json", "", "File for the table.")
flags.DEFINE_string("worst", "", "Folder for the lines that were read worst.")


@dataclasses.dataclass(frozen=True)
class Cut:
  """A line cut out of an image.

  Attributes:
    text: what it says.
    image: uint8 `[H, W, 3]`.
  """

  text: str
  image: np.ndarray


def reader_of(language: Language) -> str:
  """Name of the reader of a language."""
  return "Tesseract" if language.code in _TESSERACT else "RapidOCR"


def upright(
  picture: np.ndarray, polygon, height: int, margin: float, vertical: bool
) -> np.ndarray:
  """A polygon with a margin as a rectangle.

  Args:
    picture: uint8 `[H, W, 3]`.
    polygon: four corners from the top left one, clockwise.
    height: of the result across the line, without its margin, in pixels.
    margin: around the line, in its height.
    vertical: whether the line is a column.
  """
  corners = np.asarray(polygon, np.float32)
  sides = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)
  wide, high = sides[[0, 2]].max(), sides[[1, 3]].max()
  scale = height / (wide if vertical else high)
  wide, high, edge = wide * scale, high * scale, margin * height
  target = np.array([[0, 0], [wide, 0], [wide, high], [0, high]]) + edge
  # Pixels of cv2 are counted from their middles.
  h = cv2.getPerspectiveTransform(
    corners - 0.5, (target - 0.5).astype(np.float32)
  )
  size = round(wide + 2 * edge), round(high + 2 * edge)
  return cv2.warpPerspective(
    picture, h, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
  )


def clean(language: Language, faces, rng, pixels: int):
  """Black on white: the picture and its (text, polygon)."""
  face = faces[int(rng.integers(len(faces)))]
  text = words.paragraph(rng, language, 60)
  width, height = _SIZE
  block = typeset.block(
    text, face, language, pixels, (0, 0, 0), width - 40, height - 40,
    leading=1.5,
  )  # fmt: skip
  picture = Image.new("RGB", _SIZE, "white")
  picture.paste(block.image, (20, 20), block.image)
  lines = [
    (line.text, polygon_of([v + 20 for v in line.box])) for line in block.lines
  ]
  return np.asarray(picture), lines


def drawn(strategy: str, language: Language, job, rng):
  """A sample's picture and its (text, polygon), or None if rejected."""
  if strategy == "clean":
    pixels = flags.FLAGS.pixels
    return clean(language, job.faces[language.code], rng, pixels)
  sample = generate.draw(strategy, language.code, _SIZE, job, rng)
  if isinstance(sample, Rejected):
    return None
  lines = [(line["text"], line["polygon"]) for line in sample.layout["lines"]]
  return np.asarray(sample.image.convert("RGB")), lines


def cuts_of(strategy: str, language: Language, job) -> tuple[list[Cut], int]:
  """Lines of some samples, and how many were too small."""
  values = flags.FLAGS
  cuts, small, made = [], 0, 0
  height = _HEIGHTS[reader_of(language)]
  for attempt in range(4 * values.samples):
    rng = np.random.default_rng([values.seed, attempt])
    found = drawn(strategy, language, job, rng)
    if found is None:
      continue
    picture, lines = found
    for text, polygon in lines:
      corners = np.asarray(polygon)
      sides = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)
      vertical = language.direction == "ttb"
      across = sides[0 if vertical else 1]
      if across < values.least and strategy != "clean":
        small += 1
        continue
      image = upright(picture, polygon, height, values.margin, vertical)
      cuts.append(Cut(text, image))
    made += 1
    if made == values.samples:
      break
  return cuts, small


def rapid(cuts: list[Cut]) -> list[str]:
  """What RapidOCR reads."""
  from rapidocr import RapidOCR

  engine = RapidOCR(params={"Global.log_level": "error"})
  texts = []
  for cut in cuts:
    found = engine(
      cut.image[..., ::-1], use_det=False, use_cls=False, use_rec=True
    )
    texts.append(" ".join(found.txts or ()))
  return texts


def tesseract(cuts: list[Cut], model: str, mode: int) -> list[str]:
  """What Tesseract reads, in one process: it loads its model once."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    paths = [str(folder / f"{i}.png") for i in range(len(cuts))]
    for path, cut in zip(paths, cuts):
      # It was trained on dark letters.
      dark = np.median(cut.image) < 128
      Image.fromarray(255 - cut.image if dark else cut.image).save(path)
    (folder / "list.txt").write_text("\n".join(paths) + "\n")
    done = subprocess.run(
      ["tesseract", folder / "list.txt", "stdout", "-l", model,
       "--psm", str(mode)],
      check=True, capture_output=True, text=True,
      env={**os.environ, "OMP_THREAD_LIMIT": "1"},
    )  # fmt: skip
  # A form feed ends every page.
  return done.stdout.split("\f")[: len(cuts)]


def compared(text: str, language: Language) -> str:
  """A text as it is compared."""
  text = unicodedata.normalize("NFKC", text)
  text = "".join(c for c in text if unicodedata.category(c) != "Cf")
  return (" " if language.spaces else "").join(text.split())


def read(cuts: list[Cut], language: Language) -> list[float]:
  """NED of every line, worst lines kept if asked for."""
  if reader_of(language) == "RapidOCR":
    texts = rapid(cuts)
  else:
    texts = tesseract(cuts, *_TESSERACT[language.code])
  scores = [
    text_similarity(compared(cut.text, language), compared(text, language))
    or 0.0
    for cut, text in zip(cuts, texts)
  ]
  folder = flags.FLAGS.worst
  if folder:
    os.makedirs(folder, exist_ok=True)
    for rank, i in enumerate(np.argsort(scores)[:6]):
      name = f"{folder}/{language.code}-{rank}"
      Image.fromarray(cuts[i].image).save(f"{name}.png")
      pathlib.Path(f"{name}.txt").write_text(f"{cuts[i].text}\n{texts[i]}\n")
  return scores


def main(argv: list[str]):
  """Reads, and prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments {argv[1:]}.")
  values = flags.FLAGS
  job = generate.prepare(generate.Options(1, languages=tuple(values.languages)))
  rows, missed = [], False
  cells = [(s, c) for s in values.strategies for c in values.languages]
  for strategy, code in tqdm.tqdm(cells, "reading", file=sys.stderr):
    language = language_of(code)
    cuts, small = cuts_of(strategy, language, job)
    row = {
      "strategy": strategy, "language": code, "reader": reader_of(language),
      "lines": len(cuts), "too_small": small,
    }  # fmt: skip
    if not cuts:  # templates have no vertical text
      continue
    scores = np.array(read(cuts, language))
    mean, bar = scores.mean(), _BARS.get(code, _OTHER_BAR)
    missed |= strategy == "clean" and mean < bar
    row |= {
      "mean": round(float(mean), 3),
      "median": round(float(np.median(scores)), 3),
      "exact": round(float((scores == 1).mean()), 2),
      "bar": bar if strategy == "clean" else "",
    }
    rows.append(row)
  print("| " + " | ".join(rows[0]) + " |")
  print("|" + "---|" * len(rows[0]))
  for row in rows:
    print("| " + " | ".join(map(str, row.values())) + " |")
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(rows, indent=2) + "\n")
  sys.exit(1 if missed else 0)


if __name__ == "__main__":
  app.run(main)
