# SPDX-License-Identifier: Apache-2.0
"""Every prompt is read back to the atoms it was made of."""

import numpy as np
import pytest

from data_pipelines.shapes import atoms, edits, prompts
from data_pipelines.shapes import vocabulary as vocab
from data_pipelines.shapes.render import render


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


def in_any_order(found):
  if "text" in found:
    return found
  return sorted(map(repr, (sorted(o.items()) for o in found["objects"])))


@pytest.mark.parametrize("kind", vocab.EDIT_KINDS)
def test_atoms_of_an_edit_are_read_off_its_result(kind):
  rng = np.random.default_rng(0)
  for _ in range(40):
    example = edits.sample_edit(kind, rng)
    target = render(example.target, 64, 64)
    found = atoms.atoms_of_edit(example.instruction, target)
    assert in_any_order(found) == in_any_order(example.atoms)


def test_other_pictures_have_no_atoms():
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  stripes = np.full((64, 64, 3), 255, np.uint8)
  stripes[::8] = vocab.COLOURS["red"]
  assert atoms.atoms_of_edit("make it night", stripes) is None
  assert atoms.atoms_of_edit("change the letter to A", noise * 0 + 255) is None
