# SPDX-License-Identifier: Apache-2.0
"""The host half of a rollout: bytes, threads, a judge that resumes."""

import json
import threading

import jax
import numpy as np
import pytest

from experiments import flow_grpo
from qi2_jax import judging
from qi2_jax.errors import InputError
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.rewards.protocol import Prompt
from qi2_jax.training import grpo_task, rollout_encode, rollout_rewards


def config(**fields):
  made = flow_grpo.get_config("smoke").rewards
  made.weights.default = {"bright": 1.0, "red": 1.0}
  made.update(fields)
  return made


def bright(images, prompts, references):
  return {"bright": np.asarray([float(i.mean()) for i in images])}


def red(images, prompts, references):
  return {"red": np.asarray([float(i[..., 0].mean()) for i in images])}


BOTH = {"bright": bright, "red": red}


def test_texts_travel_as_bytes():
  for text in ("", "a red circle", "海边的灯塔，黄昏"):
    raw = rollout_rewards.to_bytes(text)
    assert raw.shape == (rollout_rewards.TEXT_BYTES,) and raw.dtype == np.uint8
    assert rollout_rewards.to_text(raw) == text
  with pytest.raises(InputError, match="longer than"):
    rollout_rewards.to_bytes("x" * 5000)


def batch(edits: bool):
  """Two samples as the loader stacks them, RGBA."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (2, 4, 4, 4), np.uint8)
  samples = [
    rollout_rewards.host_fields(
      {"image": image[i], "caption": f"prompt {i}", "kind": "glyph"}
    )
    for i in range(2)
  ]
  stacked = {k: np.stack([s[k] for s in samples]) for k in samples[0]}
  sources = (image[::-1],) if edits else ()
  return stacked | {"prompt": {"references": sources}}


def test_prompts_come_back_with_their_references_and_targets():
  asked = rollout_rewards.Asked.of(batch(edits=True)).repeated(3)
  assert [p.text for p in asked.prompts] == ["prompt 0"] * 3 + ["prompt 1"] * 3
  assert {p.kind for p in asked.prompts} == {"glyph"}
  assert asked.prompts[0].target.shape == (4, 4, 3)
  assert not np.array_equal(asked.references[0][0], asked.references[3][0])
  np.testing.assert_array_equal(asked.references[0][0], asked.prompts[3].target)
  plain = rollout_rewards.Asked.of(batch(edits=False))
  assert plain.references == [(), ()] and plain.prompts[0].target is None


def test_images_are_judged_in_a_thread_that_may_wait():
  judge = rollout_rewards.Judge(config(), BOTH)
  ready, seen = threading.Event(), []

  def images():
    seen.append(threading.current_thread())
    assert ready.wait(10)
    return np.full((2, 4, 4, 3), 7, np.uint8)

  asked = rollout_rewards.Asked([Prompt("x")] * 2, [()] * 2)
  future = judge.submit(images, asked)
  assert not future.done()  # nobody waits for it here
  ready.set()
  np.testing.assert_array_equal(future.result(10)["bright"], [7, 7])
  assert seen[0] is not threading.current_thread()


def test_advantages_come_with_what_to_log():
  judge = rollout_rewards.Judge(config(max_failures=0.5, scale="group"), BOTH)
  values = {
    "bright": np.asarray([1.0, 3.0, 2.0, 2.0]),
    "red": np.asarray([0.0, 1.0, 5.0, np.nan]),
  }
  rows, log = judge.advantages(values, ["t2i", "t2i"], 2)
  np.testing.assert_allclose(rows["advantage_B"], [-2, 2, 0, 0], atol=1e-5)
  np.testing.assert_allclose(rows["weight_B"], [2, 2, 0, 0])
  np.testing.assert_array_equal(log["zero_variance"], [0, 0, 1, 1])
  assert log["failed_rewards"][0] == 1
  # A missing value is logged as the mean of the others, never as 0.
  np.testing.assert_allclose(log["reward_red"], [0, 1, 5, 2])


def test_a_judge_goes_on_where_it_was():
  rng = np.random.default_rng(0)
  given = [{n: rng.normal(size=8) for n in BOTH} for _ in range(6)]
  for values in given:
    values["red"][:4] = 0.0  # says something in one of two groups
  judge = rollout_rewards.Judge(config(adapt_rate=0.3), BOTH)
  kinds = ["a", "b"]
  for values in given[:3]:
    judge.advantages(values, kinds, 4)
  saved = json.loads(json.dumps(judge.record()))
  assert saved["factors"]["red"] > saved["factors"]["bright"]
  again = rollout_rewards.Judge(config(adapt_rate=0.3), BOTH)
  again.restore(saved)
  for values in given[3:]:
    ours, theirs = (j.advantages(values, kinds, 4)[0] for j in (judge, again))
    np.testing.assert_array_equal(*(x["advantage_B"] for x in (ours, theirs)))
  assert again.record() == judge.record()


def test_rewards_are_found_by_name():
  found = rollout_rewards.scores(config(use=("bright",)), BOTH)
  assert list(found) == ["bright"]
  for fields, message in (
    ({"use": ("beauty",)}, "names 'beauty'"),
    ({"use": ()}, "names no reward"),
  ):
    with pytest.raises(InputError, match=message):
      rollout_rewards.scores(config(**fields), BOTH)


def test_the_entry_point_hands_over_the_rules_of_the_shapes():
  made = flow_grpo.get_config("smoke")
  (rewards,) = judging.arguments(made).values()
  assert set(rewards) == set(rollout_rewards.BUILT_IN)
  blank = [np.full((64, 64, 3), 250, np.uint8)] * 2
  asked = [Prompt("a red circle"), Prompt("a harbour at dawn")]
  values = rewards["rules"](blank, asked, [(), ()])["rules"]
  assert values[0] < 0.5 and np.isnan(values[1])
  del made.rewards
  assert judging.arguments(made) == {}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"init": ""}, "needs a model"),
    ({"data.batch_size": 6}, "must split into config.rl.parts"),
    ({"rl.candidates": 3}, "must split into"),
    ({"rl.updates": 3}, "do not split into config.rl.updates=3"),
  ],
)
def test_batches_that_do_not_divide_are_refused(fields, message):
  made = flow_grpo.get_config("smoke")
  made.init = "somewhere"
  made.update_from_flattened_dict(fields)
  mesh = create_mesh({"data": 2, "fsdp": 1, "seq": 1, "tensor": 1},
                     jax.devices()[:2])  # fmt: skip
  with pytest.raises(InputError, match=message):
    rollout_encode.check(made, mesh)


def test_the_variants_of_the_config_make_sense():
  for name in ("qwen_image_2_1", "tiny", "smoke"):
    made = flow_grpo.get_config(name)
    grpo_task.rollout_config(made)
    grpo_task.surrogate_config(made)
    assert json.loads(json.dumps(made.to_dict()))
  assert flow_grpo.get_config("qwen_image_2_1").lora.rank == 64
