# SPDX-License-Identifier: Apache-2.0
"""The whole evaluation with pipelines whose scores are known beforehand."""

import csv
import types

import numpy as np
import pytest

from data_pipelines.records import DatasetWriter, Record, encode_png
from experiments import evaluate as config_file
from qi2_jax import evaluate
from qi2_jax.errors import InputError
from qi2_jax.evaluation import report, sections, store, suite
from qi2_jax.flow.generate import SamplingConfig


class Fake:
  """Answers each request with a known image; noise where it knows none."""

  notes = ("text encoder: <stand-in>",)
  step = 7

  def __init__(self, answers):
    self.answers = answers
    self.requests = []
    self.sampling = SamplingConfig(batch_size=4)

  def generate(self, requests, config=None, progress=lambda n: None):
    self.requests += requests
    self.config = config
    images = []
    for r in requests:
      assert all(i.shape[-1] == 3 for i in r.references)
      image = self.answers.get((r.prompt, r.seed))
      if image is None:
        rng = np.random.default_rng(r.seed)
        image = rng.integers(0, 256, (r.height, r.width, 3))
      image = np.float32(image) / 127.5 - 1
      # Opaque alpha, as a four-channel VAE gives.
      images.append(np.concatenate([image, np.ones_like(image[..., :1])], -1))
      progress(len(images))
    return images

  def roundtrip(self, images):
    return list(images)

  def untrained(self):
    return Fake({})


def _config(variant="tiny", **fields):
  config = config_file.get_config(variant)
  config.update(fields)
  return config


def _run(fake, config, folder, data=None):
  folder = store.create(folder)
  return evaluate.evaluate(fake, config, folder, data), folder


def _cases(config):
  return [*evaluate.t2i_cases(config), *evaluate.edit_cases(config)]


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
  config = _config(n=24, n_edit=6)
  fake = Fake({(c.prompt, c.seed): c.truth for c in _cases(config)})
  results, folder = _run(fake, config, tmp_path_factory.mktemp("perfect"))
  return types.SimpleNamespace(
    config=config, fake=fake, results=results, folder=folder
  )


def test_right_images_score_one_and_reference_rows_hold(perfect):
  for kind in perfect.config.kinds:
    cell = perfect.results["t2i"][kind]
    assert cell["seen"] >= 0.95 and cell["held_out"] >= 0.95, kind
    assert cell["ground_truth"] == cell["vae_ceiling"] == cell["held_out"]
    assert cell["untrained"] == 0.0
    assert cell["chance"] <= 0.25, kind
    low, high = cell["interval"]["held_out"]
    assert 0 <= low < cell["held_out"] <= high <= 1
    assert cell["n"] == 24 and 1 < cell["prompts"] <= 24
  assert perfect.results["t2i"]["mean"]["chance"] < 0.1


def test_right_edits_score_one_and_copies_nothing(perfect):
  for kind in perfect.config.edit_kinds:
    cell = perfect.results["edit"][kind]
    assert cell["E"] == cell["P"] == cell["O"] == cell["vae_ceiling_O"] == 1
    assert cell["seen"]["O"] == 1 and cell["all"] >= 0.8
    assert cell["copy_source_O"] == 0.0
    # The fake answers a foreign instruction with noise, unless it is equal.
    assert cell["chance_O"] < 0.6


def test_shuffled_images_score_chance(tmp_path):
  config = _config(n=24, n_edit=0, kinds=("position", "relation"))
  cases = evaluate.t2i_cases(config)
  others = suite.partners(cases)
  fake = Fake({(c.prompt, c.seed): o.truth for c, o in zip(cases, others)})
  results, _ = _run(fake, config, tmp_path)
  assert results["t2i"]["mean"]["held_out"] <= 0.1
  assert results["t2i"]["mean"]["ground_truth"] >= 0.95


def test_samples_do_not_depend_on_how_many_there_are():
  few, many = _config(n=2, n_edit=2), _config(n=5, n_edit=5)
  many.kinds = tuple(reversed(many.kinds))
  known = {(c.suite, c.id): c for c in _cases(many)}
  for case in _cases(few):
    same = known[case.suite, case.id]
    assert (case.prompt, case.seed) == (same.prompt, same.seed)
    np.testing.assert_array_equal(case.truth, same.truth)


def test_splits_are_what_they_say():
  from data_pipelines.shapes.prompts import is_held_out

  for case in evaluate.t2i_cases(_config()):
    assert is_held_out(case.prompt) == (case.split == "held_out")


def test_partner_shares_kind_and_split_and_is_another():
  cases = _cases(_config())
  for case, other in zip(cases, suite.partners(cases)):
    assert (case.kind, case.split) == (other.kind, other.split)
    assert case.id != other.id
  assert len({o.id for o in suite.partners(cases[:4])}) == 4


def test_files_hold_every_sample_and_the_report_shows_the_first(perfect):
  with (perfect.folder / "per_sample.csv").open(newline="") as file:
    lines = list(csv.DictReader(file))
  t2i = [r for r in lines if r["suite"] == "t2i" and r["row"] == "model"]
  assert len(t2i) == 6 * 2 * 24
  rate = np.mean(
    [
      float(r["all"])
      for r in t2i
      if (r["kind"], r["split"]) == ("glyph", "held_out")
    ]
  )
  assert rate == pytest.approx(perfect.results["t2i"]["glyph"]["held_out"])
  results = perfect.results | {
    "notes": list(Fake.notes), "model": "runs/x", "step": 7, "sampling": {},
    "versions": {}, "machine": "m", "device": "d",
  }  # fmt: skip
  store.write_json(perfect.folder / "results.json", results)
  evaluate.write_report(perfect.folder, pictures=4)
  page = (perfect.folder / "report.html").read_text()
  # Per kind: 4 x 2 splits of T2I, and 2 edits of 3 images.
  assert page.count("<img") == 6 * 4 * 2 + 6 * 2 * 3
  assert "&lt;stand-in&gt;" in page and "<stand-in>" not in page
  assert "position" in sections.summary(results)


def test_one_program_per_suite_and_overrides_reach_the_sampler(perfect):
  programs = {r.program for r in perfect.fake.requests}
  assert len(programs) == 2  # with and without a source
  assert perfect.fake.config.steps == 4  # of the tiny config
  assert perfect.fake.config.batch_size == 4  # the run's own


def test_user_captions_are_sampled_beside_their_images(tmp_path):
  rng = np.random.default_rng(0)
  for name, count in (("data", 3), ("data-held_out", 1)):
    with DatasetWriter(tmp_path / name) as writer:
      for i in range(count):
        image = rng.integers(0, 256, (48, 80, 3), np.uint8)
        writer.add(
          Record(f"{i}", "t2i", f"photo {i}", "user", encode_png(image), (), {})
        )
  config = _config("captions", n_captions=2)
  results, folder = _run(
    Fake({}), config, tmp_path / "out", str(tmp_path / "data")
  )
  assert results["captions"]["seen"]["n"] == 2
  assert results["captions"]["held_out"]["n"] == 1
  assert results["captions"]["seen"]["vae_psnr"] > 70  # an exact round trip
  store.write_json(folder / "results.json", results)
  shown = report.join(sections.scores(folder))
  assert shown.count("<img") == 3 * 3 and "photo 1" in shown


@pytest.mark.parametrize(
  "fields, data, words",
  [
    ({"kinds": ("glyphs",)}, None, "config.kinds"),
    ({"splits": ()}, None, "config.splits"),
    ({}, "somewhere", "belong together"),
    ({"n": 0, "n_edit": 0}, None, "Nothing to evaluate"),
  ],
)
def test_bad_settings_are_named(fields, data, words):
  with pytest.raises(InputError, match=words):
    evaluate.check_config(_config(**fields), data)


def test_unwritable_folder_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="Cannot write"):
    store.create(tmp_path / "file" / "out")
