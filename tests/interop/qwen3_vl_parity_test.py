# SPDX-License-Identifier: Apache-2.0
"""The Qwen3-VL condition encoder equals transformers' on random weights."""

import collections
import copy
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models

from qi2_jax.conditioning.vl_layout import (
  normalise,
  over_white,
  text_positions,
)
from qi2_jax.interop import mapping
from qi2_jax.interop import qwen3_vl as interop
from qi2_jax.models.qwen3_vl import PRESETS, Qwen3VL, init_params
from qi2_jax.models.qwen3_vl_vision import VisionTower
from qi2_jax.parallel.sharding import path_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SLOT, VOCAB, LENGTH = 7, 96, 28
TOKENS = {
  "vision_start_token_id": 8, "vision_end_token_id": 9, "video_token_id": 10,
}  # fmt: skip
# Taps that leave blocks out, and more decoder layers than taps.
TEXT = {
  "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96,
  "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
  "head_dim": 32,
  "rope_parameters": {
    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
  },
}  # fmt: skip
VISION = {
  "depth": 4, "hidden_size": 48, "num_heads": 4, "intermediate_size": 80,
  "patch_size": 8, "out_hidden_size": 64, "num_position_embeddings": 36,
  "deepstack_visual_indexes": [0, 2, 3],
}  # fmt: skip
MEAN, STD = (0.5, 0.45, 0.4), (0.5, 0.3, 0.25)


@pytest.fixture(scope="module")
def reference():
  """A model whose every parameter is visible in its states."""
  model = transformers.Qwen3VLForConditionalGeneration._from_config(
    transformers.Qwen3VLConfig(
      text_config=copy.deepcopy(TEXT), vision_config=dict(VISION),
      image_token_id=SLOT, **TOKENS,
    ),
    attn_implementation="eager",
  )  # fmt: skip
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = 0.08 * torch.randn(p.shape, generator=generator)
      p.copy_(p + noise if re.search(r"norm\d?\.weight", name) else noise)
  return model.eval()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp("encoder")
  reference.save_pretrained(path)
  return path


def read(path):
  """Every tensor of a folder that the encoder reads."""
  tensors = {}
  for file in sorted(path.glob("model*.safetensors")):
    tensors |= safetensors.numpy.load_file(file)
  return {k: v for k, v in tensors.items() if not kept_out(k)}


def kept_out(name):
  return re.fullmatch(interop.IGNORED, name) is not None


def load(path):
  """`(config, params)` of a folder."""
  config = interop.config(json.loads((path / "config.json").read_text()))
  abstract = abstract_params(config)
  return config, mapping.import_tree(read(path), abstract, interop.table)


def abstract_params(config):
  return jax.eval_shape(
    functools.partial(init_params, Qwen3VL(config)), jax.random.key(0)
  )


@pytest.fixture(scope="module")
def ours(folder):
  return load(folder)


def image(grid, seed):
  """A uint8 RGBA image of `grid` cells of 16 px."""
  rng = np.random.default_rng(seed)
  shape = (grid[0] * 16, grid[1] * 16, 4)
  return rng.integers(0, 256, shape, np.uint8)


def prompt(grids, words, seed):
  """Token ids: two words, every image in brackets, `words` words."""
  rng = np.random.default_rng(seed)
  word = lambda n: rng.integers(11, VOCAB, n).tolist()  # noqa: E731
  ids = word(2)
  for h, w in grids:
    ids += [8] + [SLOT] * (h * w) + [9]
  return ids + word(words)


def on_side(row, side, fill):
  """Pads the last axis of `row` to LENGTH."""
  gap = LENGTH - row.shape[-1]
  pad = (gap, 0) if side == "left" else (0, gap)
  widths = [(0, 0)] * (row.ndim - 1) + [pad]
  return np.pad(row, widths, constant_values=fill)


def batch(rows, side="right"):
  """Both sides' inputs of `rows`, a list of tuples of grids.

  Rows with fewer images carry noise in the others' place, and rows differ in
  length.
  """
  slots = max(rows, key=len)
  theirs = collections.defaultdict(list)
  ours = collections.defaultdict(list)
  images = [[] for _ in slots]
  for i, grids in enumerate(rows):
    ids = np.asarray(prompt(grids, 3 + 2 * i, seed=i))
    true = len(ids)
    positions, index = text_positions(ids == SLOT, grids, true)
    ours["ids"].append(on_side(ids, side, 0))
    ours["valid"].append(on_side(np.ones(true, bool), side, False))
    ours["positions"].append(on_side(positions, side, 0))
    ours["index"].append(on_side(index, side, -1))
    for k, size in enumerate(slots):
      pixels = image(size, seed=10 * i + k)
      images[k].append(normalise(over_white(pixels), MEAN, STD))
      if k < len(grids):
        theirs["images"].append(pixels)
  ours = {k: np.stack(v) for k, v in ours.items()}
  ours["images"] = tuple(np.stack(x) for x in images)
  return ours, theirs["images"]


def processed(pixels, **sizes):
  """The published image processor on RGBA images, which it may not resize."""
  from PIL import Image

  def paste(array):
    picture = Image.fromarray(array)
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return white

  processor = transformers.Qwen2VLImageProcessorPil(
    patch_size=8, image_mean=MEAN, image_std=STD, **sizes
  )
  return processor([paste(p) for p in pixels], return_tensors="pt")


def torch_inputs(inputs, pixels):
  ids = torch.tensor(inputs["ids"])
  out = {"input_ids": ids, "attention_mask": torch.tensor(inputs["valid"])}
  if pixels:
    out |= processed(pixels, do_resize=False)
    out["mm_token_type_ids"] = (ids == SLOT).int()
  return out


def torch_states(model, inputs, pixels):
  """What the final norm is given (`hidden_states[-1]` is what it returns)."""
  seen = []
  hook = model.model.language_model.norm.register_forward_pre_hook(
    lambda _, args: seen.append(args[0].numpy())
  )
  with torch.no_grad():
    model.model(**torch_inputs(inputs, pixels))
  hook.remove()
  return seen[0]


@functools.cache
def jitted(config):
  return jax.jit(lambda params, *args: Qwen3VL(config).apply(
    {"params": params}, *args))  # fmt: skip


def jax_states(config, params, inputs):
  return jitted(config)(
    params, inputs["ids"], inputs["valid"], inputs["positions"],
    inputs["index"], inputs["images"],
  )  # fmt: skip


def relative(ours, theirs, valid):
  return tiny_models.relative(np.asarray(ours)[valid], theirs[valid])


CASES = {
  "text": ((), (), ()),
  "square": (((2, 2),),),
  "two_in_a_row": (((2, 3), (4, 1)),),
  "one_and_two": (((2, 3),), ((2, 3), (3, 2))),
  "mixed": ((), ((3, 2),), (), ((3, 2), (1, 4))),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_states_equal_transformers(name, side, reference, ours):
  inputs, pixels = batch(CASES[name], side)
  theirs = torch_states(reference, inputs, pixels)
  states = jax_states(*ours, inputs)
  assert states.dtype == jnp.float32
  assert relative(states, theirs, inputs["valid"]) <= 5e-6


def test_the_controls_fail(reference, ours):
  config, params = ours
  inputs, pixels = batch(CASES["one_and_two"])
  theirs, valid = torch_states(reference, inputs, pixels), inputs["valid"]
  assert relative(jax_states(config, params, inputs), theirs, valid) <= 5e-6
  visual = dict(params["visual"])
  visual["deepstack"] = jax.tree.map(np.zeros_like, visual["deepstack"])
  without = jax_states(config, {**params, "visual": visual}, inputs)
  assert relative(without, theirs, valid) > 1e-2
  flat = np.broadcast_to(np.arange(LENGTH), inputs["positions"].shape)
  one_axis = jax_states(config, params, {**inputs, "positions": flat})
  assert relative(one_axis, theirs, valid) > 1e-2


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_equal_get_rope_index(side, reference):
  inputs, pixels = batch(CASES["mixed"], side)
  given = torch_inputs(inputs, pixels)
  theirs, _ = reference.model.get_rope_index(
    given["input_ids"],
    mm_token_type_ids=given["mm_token_type_ids"],
    image_grid_thw=given["image_grid_thw"],
    attention_mask=given["attention_mask"],
  )
  np.testing.assert_array_equal(
    inputs["positions"].transpose(1, 0, 2), theirs.numpy()
  )


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
@pytest.mark.parametrize(
  "sizes",
  [{"do_resize": False}, {"size": {"shortest_edge": 1, "longest_edge": 4**9}}],
  ids=["do_resize", "bounds"],
)
def test_tower_equals_transformers_from_pixels(grid, sizes, reference, ours):
  config, params = ours
  pixels = image(grid, seed=5)
  given = processed([pixels], **sizes)
  with torch.no_grad():
    theirs = reference.model.visual(
      given["pixel_values"], grid_thw=given["image_grid_thw"]
    )
  given = normalise(over_white(pixels), MEAN, STD)[None]
  merged, deepstack = jax.jit(VisionTower(config.vision).apply)(
    {"params": params["visual"]}, given
  )
  assert merged.shape == (1, grid[0] * grid[1], 64)
  assert tiny_models.relative(merged[0], theirs.pooler_output) <= 5e-6
  assert len(theirs.deepstack_features) == deepstack.shape[0] == 3
  for a, b in zip(deepstack, theirs.deepstack_features):
    assert tiny_models.relative(a[0], b) <= 5e-6


@pytest.mark.parametrize("shards", ["10GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_come_back_to_the_bit(dtype, shards, reference, tmp_path):
  model = copy.deepcopy(reference).to(dtype)
  model.save_pretrained(tmp_path, max_shard_size=shards)
  files = list(tmp_path.glob("model*.safetensors"))
  assert (len(files) > 1) == (shards == "100KB")
  _, params = load(tmp_path)
  exported = mapping.export_tree(params, interop.table)
  originals = read(tmp_path)
  assert exported.keys() == originals.keys()
  kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
  for key, value in originals.items():
    assert exported[key].dtype == value.dtype == kind
    np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_our_tiny_encoder_loads_in_transformers(tmp_path):
  config = dataclasses.replace(PRESETS["tiny"], image_token_id=SLOT)
  fresh = jax.jit(functools.partial(init_params, Qwen3VL(config)))
  params = fresh(jax.random.key(2))
  tensors = mapping.export_tree(params, interop.table)
  tensors |= interop.extra_tensors(config)
  safetensors.numpy.save_file(
    tensors, tmp_path / "model.safetensors", {"format": "pt"}
  )
  text = json.dumps(interop.published(config, **TOKENS))
  (tmp_path / "config.json").write_text(text)
  model, info = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert interop.config(json.loads(text)) == config
  inputs, _ = batch(CASES["text"])
  theirs = torch_states(model.eval(), inputs, [])
  states = jax_states(config, params, inputs)
  assert relative(states, theirs, inputs["valid"]) <= 5e-6


def test_full_size_has_the_public_tensors():
  config = PRESETS["qwen3_vl_8b"]
  ours = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    abstract_params(config)
  ):
    entry = interop.table(path_name(path))
    count = leaf.shape[0] if entry.scanned else 1
    for i in range(count):
      ours[entry.name.format(layer=i)] = leaf.size // count
  published = interop.published(config, **TOKENS)
  # The public file does not tie them.
  published["tie_word_embeddings"] = False
  with torch.device("meta"):
    model = transformers.Qwen3VLForConditionalGeneration(
      transformers.Qwen3VLConfig(**published)
    )
  theirs = {k: v.numel() for k, v in model.state_dict().items()}
  left = {k for k in theirs if kept_out(k)}
  assert left == {"lm_head.weight", "model.language_model.norm.weight"}
  assert ours == {k: v for k, v in theirs.items() if k not in left}
  visual = sum(v for k, v in ours.items() if k.startswith("model.visual."))
  assert round(visual / 1e9, 3) == 0.576
  text = sum(ours.values()) - visual + config.width
  assert round(text / 1e9, 3) == 7.568
