# SPDX-License-Identifier: Apache-2.0
"""Every prompt is read back to the atoms it was made of."""

import numpy as np
import pytest

from data_pipelines.shapes import atoms, edits, prompts
from data_pipelines.shapes import vocabulary as vocab


@pytest.mark.parametrize("kind", vocab.T2I_KINDS)
def test_prompts_are_read_back(kind):
  rng = np.random.default_rng(0)
  for _ in range(200):
    example = prompts.sample_t2i(kind, rng)
    assert atoms.atoms_of(example.prompt) == example.atoms


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_instructions_are_none_of_them(kind):
  example = edits.sample_edit(kind, np.random.default_rng(0))
  assert atoms.atoms_of(example.instruction) is None


@pytest.mark.parametrize(
  "prompt", ["", "a lighthouse at dawn", "a red circle and more", "red circle"]
)
def test_other_texts_have_no_atoms(prompt):
  assert atoms.atoms_of(prompt) is None
