# SPDX-License-Identifier: Apache-2.0
"""Style transfer by a deterministic filter."""

import numpy as np

from data_pipelines.edit_pairs import colours, styles
from data_pipelines.edit_pairs.pair import Pair
from data_pipelines.edit_pairs.supply import Supply


def draw(supply: Supply, rng: np.random.Generator) -> Pair:
  """One pair; see `styles.STYLES` for the operations."""
  image = supply.picture().image
  names = list(styles.STYLES)
  operation = names[int(rng.integers(len(names)))]
  after, parameters = styles.STYLES[operation](colours.visible(image), rng)
  return Pair(
    f"style_{operation}",
    (image,),
    colours.replaced(image, after),
    colours.shown(image),
    {name: str(value) for name, value in parameters.items()},
    parameters,
  )
