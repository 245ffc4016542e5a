# SPDX-License-Identifier: Apache-2.0
"""Structure-aware pairs: a map of a picture and the picture, both ways.

Edges, line art, grey and regions of colour are computed from any picture.
Layers of depth need a scene of cut-outs, whose order is known: nothing here
estimates depth from pixels.

Shapes: H height, W width, C 3 colours.
"""

import cv2
import numpy as np
from PIL import Image

from data_pipelines.edit_pairs import colours, scene
from data_pipelines.edit_pairs.pair import Pair, Picture
from data_pipelines.edit_pairs.supply import Supply
from data_pipelines.filters import pixels

_REGIONS_SIDE = 96  # regions are found in a small copy


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair; see MAPS and `depth` for the operations."""
  names = [*MAPS, "depth"] if supply.has_things else list(MAPS)
  name = names[int(rng.integers(len(names)))]
  if name == "depth":
    picture, structure, parameters = _scene_with_depth(supply, rng)
  else:
    picture = supply.picture()
    rgb = np.asarray(pixels.on_white(picture.image))
    structure, parameters = MAPS[name](rgb, rng)
  image = pixels.on_white(picture.image)
  drawn = Image.fromarray(structure)
  language = None
  if rng.random() < 0.5:
    return Pair(
      f"picture_to_{name}", (image,), drawn, None, {}, parameters,
      redrawn=True,
    )  # fmt: skip
  operation, slots = f"{name}_to_picture", {}
  description = picture.caption or (picture.name and picture.name.en)
  if description:
    operation, slots = f"{operation}_of", {"description": description}
    if picture.caption:
      # A Chinese caption belongs into a Chinese sentence.
      language = "en" if description.isascii() else "zh"
    else:
      slots = {"description": picture.name}
  return Pair(
    operation, (drawn,), image, None, slots, parameters, redrawn=True,
    language=language,
  )  # fmt: skip


def edges(rgb_HWC: np.ndarray, rng: np.random.Generator):
  """White edges on black (Canny), between quantiles of the gradient."""
  share = round(float(rng.uniform(0.85, 0.93)), 3)
  grey = cv2.GaussianBlur(
    cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY), (0, 0), 1.2
  )
  steps = [cv2.Sobel(grey, cv2.CV_32F, *order) for order in ((1, 0), (0, 1))]
  high = float(np.quantile(np.abs(steps[0]) + np.abs(steps[1]), share))
  high = round(max(high, 20.0), 1)
  found = cv2.Canny(grey, high * 0.4, high)
  return colours.grey(found), {"low": round(high * 0.4, 1), "high": high}


def line_art(rgb_HWC: np.ndarray, rng: np.random.Generator):
  """Soft black lines on white: a difference of Gaussians."""
  sigma = round(float(rng.uniform(0.8, 1.6)), 2)
  grey = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
  near = cv2.GaussianBlur(grey, (0, 0), sigma)
  far = cv2.GaussianBlur(grey, (0, 0), sigma * 2.2)
  dark = np.clip((far - near - 1.5) * 22, 0, 255)
  return colours.grey((255 - dark).astype(np.uint8)), {"sigma": sigma}


def grey(rgb_HWC: np.ndarray, rng: np.random.Generator):
  """Luma."""
  del rng
  return colours.grey(cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY)), {}


def regions(rgb_HWC: np.ndarray, rng: np.random.Generator):
  """Regions of like colour and place, each in a colour of its own."""
  count = int(rng.integers(6, 13))
  height, width = rgb_HWC.shape[:2]
  scale = _REGIONS_SIDE / max(height, width)
  size = (max(2, round(width * scale)), max(2, round(height * scale)))
  small = cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_AREA)
  lab = cv2.cvtColor(cv2.medianBlur(small, 5), cv2.COLOR_RGB2LAB)
  y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
  features = np.concatenate(
    [lab.astype(np.float32), x[..., None] * 0.6, y[..., None] * 0.6], axis=-1
  ).reshape(-1, 5)
  # OpenCV draws the first centres from a generator of its own.
  cv2.setRNGSeed(int(rng.integers(2**31)))
  criteria = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, 12, 1.0)
  flags = cv2.KMEANS_PP_CENTERS
  label = cv2.kmeans(features, count, None, criteria, 1, flags)[1]
  palette = _palette(count, rng)
  coloured = palette[label.reshape(size[1], size[0])]
  large = cv2.resize(coloured, (width, height), interpolation=cv2.INTER_NEAREST)
  return large, {"regions": count}


MAPS = {
  "edges": edges, "line_art": line_art, "grey": grey, "regions": regions,
}  # fmt: skip


def depth(placed: list[scene.Placed], size: tuple[int, int]) -> np.ndarray:
  """A dark background, and the things before it: the lower, the nearer.

  Of the background nothing is known but that it is behind.
  """
  width, height = size
  levels = np.full((height, width), 20, np.uint8)
  for item in sorted(placed, key=lambda item: item.y + item.image.height):
    base = min(height, item.y + item.image.height)
    levels[scene.footprint([item], size)] = 60 + round(base / height * 190)
  return colours.grey(levels)


def _scene_with_depth(supply: Supply, rng: np.random.Generator):
  background = supply.place()
  placed = supply.placed(int(rng.integers(2, 4)))
  image = scene.render(background.image, placed)
  name = scene.describe(placed, background)
  picture = Picture(image, background.id, name=name)
  parameters = {"things": [item.describe() for item in placed]}
  return picture, depth(placed, supply.size), parameters


def _palette(count: int, rng: np.random.Generator) -> np.ndarray:
  """uint8 [count, 3]: hues at equal distances, in random order."""
  hue = (np.arange(count) * 179 / count).astype(np.uint8)
  value = np.where(np.arange(count) % 2, 150, 235).astype(np.uint8)
  hsv = np.stack([hue, np.full(count, 190, np.uint8), value], axis=-1)
  rgb = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
  return rgb[rng.permutation(count)]
