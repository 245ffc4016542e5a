# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP equal transformers' on random weights, from folders."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qi2_jax.errors import InputError
from qi2_jax.interop import clip, image_text, mapping, siglip, vit
from qi2_jax.models import clip as clip_model
from qi2_jax.models import siglip as siglip_model
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import path_name, tree_shardings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
folders = pytest.importorskip("image_text_folders")

# Odd widths, sizes that no whole number of patches fills, both activations,
# both ways to find the end of a text.
CASES = {
  "clip": lambda path: folders.clip(path),
  "clip_gelu": lambda path: folders.clip(
    path, activation="gelu", text_width=40, vision_width=36, projection=44,
    image_size=30, patch=7, eos=2,
  ),
  "siglip": lambda path: folders.siglip(path),
  "siglip_equal": lambda path: folders.siglip(
    path, width=48, text_width=48, image_size=30, patch=10
  ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  out = {}
  for name, build in CASES.items():
    path = tmp_path_factory.mktemp(name)
    out[name] = (*build(path), path)
  return out


def pictures():
  rng = np.random.default_rng(0)
  sizes = ((40, 40), (61, 90), (120, 33), (9, 14))
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def inputs(tokenizer, processor, length):
  ids = tokenizer(
    list(folders.TEXTS), padding="max_length", truncation=True,
    max_length=length, return_tensors="pt",
  )["input_ids"]  # fmt: skip
  return ids, processor(pictures(), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("case", CASES)
def test_embeddings_and_logits_equal_transformers(case, made):
  model, tokenizer, processor, path = made[case]
  scorer = image_text.load(str(path))
  ids, pixels = inputs(tokenizer, processor, scorer.model.config.length)
  with torch.no_grad():
    # No mask: neither model was trained with one.
    theirs = model(input_ids=ids, pixel_values=pixels)
  np.testing.assert_array_equal(scorer.tokens(folders.TEXTS), ids)
  images = image_text.embed_images(scorer, pictures(), batch_size=3)
  texts = image_text.embed_texts(scorer, folders.TEXTS, batch_size=4)
  logits = image_text.scaled(scorer, images @ texts.T)
  assert np.abs(images - theirs.image_embeds.numpy()).max() <= 1e-5
  assert np.abs(texts - theirs.text_embeds.numpy()).max() <= 1e-5
  expected = theirs.logits_per_image.numpy()
  assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
  # Both say something: rows and columns differ.
  assert expected.std(axis=0).min() > 1e-3 < expected.std(axis=1).min()
  both = jax.jit(scorer.model.apply)(
    {"params": scorer.params}, pixels.permute(0, 2, 3, 1).numpy(), ids.numpy()
  )
  np.testing.assert_allclose(both, logits, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_patches_are_the_last_states(case, made):
  model, _, processor, path = made[case]
  scorer = image_text.load(str(path))
  side = scorer.model.config.image_size
  # Square images of the right size are neither squeezed nor cropped.
  image = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
  pixels = processor([image], return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    states = model.vision_model(pixels).last_hidden_state.numpy()
  states = states[:, 1:] if case.startswith("clip") else states
  found = image_text.patches(scorer, [image], batch_size=1)
  grid = scorer.model.config.side
  assert found.shape == (1, grid, grid, states.shape[-1])
  expected = states.reshape(found.shape)
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case, module", [("clip", clip), ("siglip", siglip)])
def test_every_tensor_comes_back_to_the_bit(case, module, made):
  path = made[case][-1]
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  params = image_text.load(str(path)).params
  exported = mapping.export_tree(params, module.table)
  assert exported.keys() == tensors.keys()
  for name, tensor in exported.items():
    assert tensor.shape == tensors[name].shape, name
    np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_old_files_say_some_things_twice(made, tmp_path):
  """The second text section wins, filled up by the class's own values."""
  path = made["clip"][-1]
  shutil.copytree(path, tmp_path / "old")
  published = json.loads((path / "config.json").read_text())
  text = dict(published["text_config"])
  wrong = text | {"eos_token_id": 2, "hidden_act": "gelu"}
  again = {k: v for k, v in text.items() if k != "hidden_act"}
  folders.edit_json(
    tmp_path / "old" / "config.json", text_config=wrong, text_config_dict=again
  )
  theirs = transformers.CLIPConfig.from_pretrained(tmp_path / "old")
  ours = image_text.load(str(tmp_path / "old")).model.config
  assert theirs.text_config.hidden_act == ours.text.activation == "quick_gelu"
  assert theirs.text_config.eos_token_id == ours.eos
  # Old weight files number their positions.
  file = tmp_path / "old" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["text_model.embeddings.position_ids"] = np.arange(21)[None]
  safetensors.numpy.save_file(tensors, file)
  image_text.load(str(tmp_path / "old"))


PRESETS = {
  "vit_l_14": (clip, clip_model, clip_model.CLIP, 427_616_513),
  "so400m": (siglip, siglip_model, siglip_model.SigLIP, 877_960_498),
}


def published(name):
  """The fields of the public files that differ from the classes' own."""
  if name == "vit_l_14":
    return transformers.CLIPConfig(
      text_config={
        "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12, "projection_dim": 768,
      },
      vision_config={
        "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
        "projection_dim": 768,
      },
      projection_dim=768,
    )  # fmt: skip
  tower = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16,
  }  # fmt: skip
  return transformers.SiglipConfig(
    text_config=tower,
    vision_config=tower | {"image_size": 384, "patch_size": 14},
  )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_public_models(name):
  module, model_lib, flax_class, size = PRESETS[name]
  config = model_lib.PRESETS[name]
  assert module.config(json.loads(published(name).to_json_string())) == config
  # Files leave out what equals the class's own values.
  assert module.config(published(name).to_diff_dict()) == config
  torch_class = {"clip": transformers.CLIPModel}.get(
    module.KIND, transformers.SiglipModel
  )
  with torch.device("meta"):
    theirs = torch_class(published(name)).state_dict()
  mine = vit.abstract_params(flax_class(config))
  assert sum(x.size for x in jax.tree.leaves(mine)) == size
  assert sum(v.numel() for v in theirs.values()) == size
  mapping.check_tensors(
    {k: tuple(v.shape) for k, v in theirs.items()}, mine, module.table
  )
  mesh = create_mesh({"fsdp": 4, "tensor": 2})
  places = tree_shardings(mine, model_lib.SHARDING_RULES, mesh)
  spec = places["text"]["blocks"]["to_q"]["kernel"].spec
  assert spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
  # Nothing large is whole on every device.
  specs = jax.tree.map(lambda place: any(place.spec), places)
  for path, split in jax.tree_util.tree_leaves_with_path(specs):
    assert split or re.search(r"norm|bias|scale|cls|probe", path_name(path))


def test_weights_go_straight_to_their_shards(made):
  path = made["siglip"][-1]
  mesh = create_mesh({"fsdp": 4, "tensor": 2})
  whole = image_text.load(str(path))
  split = image_text.load(
    str(path), param_dtype=jnp.bfloat16,
    shardings=lambda tree: tree_shardings(
      tree, siglip_model.SHARDING_RULES, mesh
    ),
  )  # fmt: skip
  kernel = split.params["vision"]["blocks"]["fc1"]["kernel"]
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(
    None, "fsdp", "tensor"
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b),
    whole.params, split.params,
  )  # fmt: skip


@pytest.mark.parametrize("case, section, field, value, message", [
  ("clip", None, "model_type", "blip", "of type 'blip'"),
  ("siglip", None, "model_type", "siglip2", "of type 'siglip2'"),
  ("clip", "vision_config", "num_channels", 4, "num_channels"),
  ("clip", "text_config", "eos_token_id", [1, 2], "single"),
  ("clip", "text_config", "hidden_act", "relu", "'relu' is unknown"),
  ("clip", "vision_config", "num_attention_heads", 5, "no multiple of 5"),
  ("clip", "vision_config", "image_size", 0, "image_size"),
  ("clip", "text_config", "eos_token_id", 5, "end of text 5"),
  ("clip", "vision_config", "image_size", 48, "model takes 48 px"),
  ("clip", "vision_config", "hidden_size", 24, "has shape"),
  ("siglip", "vision_config", "vision_use_head", False, "vision_use_head"),
  ("siglip", "text_config", "projection_size", 40, "projected to 40"),
  ("siglip", "text_config", "vocab_size", 3, "vocabulary 3"),
])  # fmt: skip
def test_what_does_not_fit_is_named(
  case, section, field, value, message, made, tmp_path
):
  path = tmp_path / "copy"
  shutil.copytree(made[case][-1], path)
  config = json.loads((path / "config.json").read_text())
  (config[section] if section else config)[field] = value
  (path / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match=message):
    image_text.load(str(path))


def test_strangers_are_named():
  for module in (clip, siglip):
    with pytest.raises(InputError, match="of a bert model"):
      module.config({"model_type": "bert"})
    for path in ("vision/blocks/fc3/kernel", "norm/scale"):
      with pytest.raises(InputError, match=path):
        module.table(path)
  with pytest.raises(InputError, match="does not exist"):
    image_text.load("nowhere")
  assert re.fullmatch(vit.IGNORED, "vision_model.embeddings.position_ids")
