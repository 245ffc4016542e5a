# SPDX-License-Identifier: Apache-2.0
"""How far one image is from another: PSNR, SSIM, and read texts.

On uint8 pixels, as files hold them. scikit-image has both image metrics, but
nothing else here needs it; scipy is there anyway.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from qi2_jax.errors import InputError

# Wang et al. 2004: an 11 x 11 Gaussian window of width 1.5.
_SIGMA = 1.5
_RADIUS = 5
_K1, _K2 = 0.01, 0.03
_RANGE = 255.0


def _check(a: np.ndarray, b: np.ndarray) -> None:
  if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
    raise InputError(
      f"images of {a.dtype} {a.shape} and {b.dtype} {b.shape} cannot be "
      "compared; both must be uint8 [H, W, C] of one shape."
    )


def psnr(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB; infinite for equal images.

  Raises:
    InputError: the images are not uint8 of one shape.
  """
  _check(a_HWC, b_HWC)
  error = np.mean((np.float64(a_HWC) - np.float64(b_HWC)) ** 2)
  return 10 * math.log10(_RANGE**2 / error) if error else math.inf


def ssim(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
  """Structural similarity (Wang et al. 2004), mean over window and channels.

  The window is Gaussian and covariances are the population's, over pixels
  whose window lies inside: scikit-image's `structural_similarity` with
  `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`, which is
  also what the protocol of the VAE report (piq, no downsampling) computes.

  Raises:
    InputError: the images are not uint8 of one shape, or smaller than 11 px.
  """
  _check(a_HWC, b_HWC)
  side = 2 * _RADIUS + 1
  if min(a_HWC.shape[:2]) < side:
    raise InputError(
      f"SSIM needs images of at least {side} px a side, not {a_HWC.shape[:2]}."
    )

  def blur(x):
    out = ndimage.gaussian_filter(x, _SIGMA, radius=_RADIUS, axes=(0, 1))
    return out[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]

  a, b = np.float64(a_HWC), np.float64(b_HWC)
  mean_a, mean_b = blur(a), blur(b)
  var_a = blur(a * a) - mean_a**2
  var_b = blur(b * b) - mean_b**2
  both = blur(a * b) - mean_a * mean_b
  c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
  top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
  bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  return float(np.mean(top / bottom))


def edit_distance(a: Sequence, b: Sequence) -> int:
  """Levenshtein distance: insertions, deletions and substitutions."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    corner, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      corner, row[j] = (
        row[j],
        min(row[j] + 1, row[j - 1] + 1, corner + (x != y)),
      )
  return row[-1]


def text_similarity(a: str, b: str) -> float | None:
  """`1 - edit distance / longer length`, the reports' NED; None of no text.

  Texts are compared as they are read, without normalisation, as in
  OmniDoc-TokenBench.
  """
  longest = max(len(a), len(b))
  return 1 - edit_distance(a, b) / longest if longest else None
