# SPDX-License-Identifier: Apache-2.0
"""Duplicate search against brute force."""

import itertools

import numpy as np
import pytest
from fingerprints import brute_force, fingerprints

from data_pipelines.filters import dedup


@pytest.mark.parametrize("max_phash", [0, 3, 4, 7, 10])
@pytest.mark.parametrize("max_colour", [0.5, 3.0, 300.0])
def test_no_pair_is_missed_and_none_is_wrong(max_phash, max_colour):
  prints = fingerprints(400, seed=max_phash)
  found = dedup.perceptual_pairs(*prints, max_phash, 8, max_colour)
  expected = brute_force(*prints, max_phash, 8, max_colour)
  assert found.tolist() == expected
  assert expected


def test_small_chunks_find_the_same(monkeypatch):
  prints = fingerprints(300)
  whole = dedup.perceptual_pairs(*prints, 7, 12, 5.0)
  monkeypatch.setattr(dedup, "_MAX_PAIRS", 7)
  chunks = dedup.perceptual_pairs(*prints, 7, 12, 5.0)
  assert chunks.tolist() == whole.tolist() and len(whole)


def test_blank_images_of_many_greys_stay_cheap(monkeypatch):
  expanded = []
  original = dedup._expand

  def counting(first, last):
    expanded.append(int((last - first).sum()))
    return original(first, last)

  monkeypatch.setattr(dedup, "_expand", counting)
  monkeypatch.setattr(dedup, "_MAX_LIGHT", 0.5)
  count = 4000
  same = np.zeros(count, np.uint64)
  level = (np.arange(count) % 250).astype(np.uint8)
  thumb = np.repeat(level[:, None], 192, axis=1)
  found = dedup.perceptual_pairs(same, same, thumb, 3, 3, 0.5)
  assert len(found) == 250 * (16 * 15 // 2)
  assert max(expanded) < count * 20  # not count squared


def test_brightness_and_contrast_are_evened_out_but_not_hue():
  rng = np.random.default_rng(0)
  thumb = rng.integers(60, 180, (1, 192)).astype(np.uint8)
  lighter, flatter = thumb + 30, (thumb * 0.8).astype(np.uint8)
  swapped = thumb.reshape(1, 64, 3)[..., ::-1].reshape(1, 192)
  even = dedup.even_colours(np.concatenate([thumb, lighter, flatter, swapped]))
  difference = np.abs(even - even[0]).mean(axis=1)
  assert difference[1] == 0 and difference[2] < 1 < 20 < difference[3]
  # Noise of nearly flat images is not blown up.
  flat = rng.integers(100, 102, (1, 192)).astype(np.uint8)
  assert np.abs(dedup.even_colours(flat)).max() < 4


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_embeddings(monkeypatch, block):
  monkeypatch.setattr(dedup, "_EMBEDDING_BLOCK", block)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 8)) * rng.uniform(0.1, 9, (60, 1))
  x[40:] = x[:20] * 3 + rng.normal(size=(20, 8)) * 0.02
  cosine = x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2)
  expected = np.argwhere(np.triu(cosine > 0.995, 1)).tolist()
  found = dedup.embedding_pairs(x, 0.995)
  assert sorted(found.tolist()) == expected and len(expected) > 5


def test_components_are_those_of_union_find():
  rng = np.random.default_rng(1)
  pairs = rng.integers(0, 200, (120, 2))
  parent = list(range(200))

  def root(i):
    while parent[i] != i:
      i = parent[i]
    return i

  for i, j in pairs.tolist():
    parent[root(i)] = root(j)
  label = dedup.components(200, pairs)
  for i, j in itertools.combinations(range(200), 2):
    assert (label[i] == label[j]) == (root(i) == root(j))


def test_groups_of_equals():
  first, second = np.array([5, 5, 1, 5, 1]), np.array([0, 0, 0, 9, 0])
  label = dedup.groups_of_equals(first, second)
  assert (label[:, None] == label).tolist() == (
    ((first[:, None] == first) & (second[:, None] == second)).tolist()
  )
  assert not len(dedup.groups_of_equals(np.zeros(0, np.int64)))


def test_best_of_each():
  label = np.array([3, 1, 3, 1, 7])
  rank = np.array([4, 0, 2, 1, 3])
  assert dedup.best_of_each(label, rank).tolist() == [2, 1, 2, 1, 4]
