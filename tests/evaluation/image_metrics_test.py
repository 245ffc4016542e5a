# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against scikit-image; NED by hand."""

import numpy as np
import pytest
from scipy import signal

from qi2_jax.errors import InputError
from qi2_jax.evaluation import image_metrics


def pair(seed, height=37, width=52, noise=20.0):
  """A smooth image with edges, and a noisy copy of it."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  image = 127 + 90 * np.sin(x / 5 + seed)[..., None] * np.cos(y / 7)[..., None]
  image = np.repeat(image, 3, -1) + rng.normal(size=3) * 20
  image[10:20, 10:30] = rng.uniform(0, 255, 3)
  noisy = image + noise * rng.normal(size=image.shape)
  return [np.uint8(np.clip(v, 0, 255)) for v in (image, noisy)]


@pytest.mark.parametrize("seed, noise", [(0, 20.0), (1, 3.0), (2, 80.0)])
def test_they_equal_scikit_image(seed, noise):
  metrics = pytest.importorskip("skimage.metrics")
  a, b = pair(seed, noise=noise)
  theirs = metrics.structural_similarity(
    a, b, channel_axis=2, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255,
  )  # fmt: skip
  assert image_metrics.ssim(a, b) == pytest.approx(theirs, abs=1e-4)
  assert image_metrics.psnr(a, b) == pytest.approx(
    metrics.peak_signal_noise_ratio(a, b), abs=1e-4
  )
  assert 0.05 < theirs < 0.995


def test_ssim_is_the_published_formula():
  """Written out for one channel, by plain two-dimensional convolution."""
  a, b = (x[..., :1] for x in pair(3))
  line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
  window = np.outer(line, line) / line.sum() ** 2

  def mean(x):
    return signal.convolve2d(x, window, mode="valid")

  x, y = (np.float64(v[..., 0]) for v in (a, b))
  mx, my = mean(x), mean(y)
  vx, vy = mean(x * x) - mx**2, mean(y * y) - my**2
  cov = mean(x * y) - mx * my
  c1, c2 = 2.55**2, 7.65**2
  index = ((2 * mx * my + c1) * (2 * cov + c2)) / (
    (mx**2 + my**2 + c1) * (vx + vy + c2)
  )
  assert image_metrics.ssim(a, b) == pytest.approx(index.mean(), abs=1e-8)


def test_equal_images_are_perfect():
  a, _ = pair(0)
  assert image_metrics.psnr(a, a) == np.inf
  assert image_metrics.ssim(a, a) == pytest.approx(1.0)


def test_one_grey_level_everywhere_is_48_13_db():
  a = np.full((16, 16, 3), 100, np.uint8)
  assert image_metrics.psnr(a, a + 1) == pytest.approx(20 * np.log10(255))


@pytest.mark.parametrize("a, b, distance", [
  ("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
  ("书法", "书", 1),
])  # fmt: skip
def test_edit_distance(a, b, distance):
  assert image_metrics.edit_distance(a, b) == distance
  assert image_metrics.edit_distance(b, a) == distance


def test_text_similarity():
  assert image_metrics.text_similarity("kitten", "sitting") == 1 - 3 / 7
  assert image_metrics.text_similarity("A b", "A b") == 1
  assert image_metrics.text_similarity("abc", "") == 0
  assert image_metrics.text_similarity("", "") is None


def test_what_cannot_be_compared_is_named():
  a, b = pair(0)
  for metric in (image_metrics.psnr, image_metrics.ssim):
    with pytest.raises(InputError, match="one shape"):
      metric(a, b[:-1])
    with pytest.raises(InputError, match="uint8"):
      metric(a, np.float32(b))
  with pytest.raises(InputError, match="11 px"):
    image_metrics.ssim(a[:10], b[:10])
