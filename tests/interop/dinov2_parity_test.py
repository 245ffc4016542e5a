# SPDX-License-Identifier: Apache-2.0
"""DINOv2 equals transformers' on random weights, from files on disk."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging

from qi2_jax.errors import InputError
from qi2_jax.interop import dinov2 as interop
from qi2_jax.interop import mapping
from qi2_jax.models.dinov2 import PRESETS, SHARDING_RULES, DINOv2, upto
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.parallel.sharding import path_name, tree_shardings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FIELDS = {
  "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3,
  "mlp_ratio": 3, "image_size": 70, "patch_size": 14,
}  # fmt: skip
KINDS = {
  "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, {}),
  "registers": (
    transformers.Dinov2WithRegistersConfig,
    transformers.Dinov2WithRegistersModel,
    {"num_register_tokens": 3},
  ),
}


def build(kind):
  """A model whose every parameter is visible in its states."""
  config, model, more = KINDS[kind]
  model = model._from_config(
    config(**FIELDS, **more), attn_implementation="eager"
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = 0.1 * torch.randn(p.shape, generator=generator)
      keep = re.search(r"norm\d?\.weight|lambda1", name)
      p.copy_(p + noise if keep else noise)
  return model.eval()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  out = {}
  for kind in KINDS:
    path = tmp_path_factory.mktemp(kind)
    out[kind] = (build(kind), path)
    out[kind][0].save_pretrained(path)
  return out


def states(model, image_BHWC, registers=0):
  """Patches of `hidden_states`, `[L + 1, B, h, w, D]`."""
  b, height, width, _ = image_BHWC.shape
  with torch.no_grad():
    out = model(
      torch.tensor(image_BHWC).permute(0, 3, 1, 2), output_hidden_states=True
    ).hidden_states
  grid = (b, height // 14, width // 14, -1)
  return [s[:, 1 + registers :].reshape(grid).numpy() for s in out]


@pytest.mark.parametrize("kind, size, layer", [
  ("dinov2", (70, 70), 0), ("dinov2", (70, 70), None),
  ("dinov2", (112, 56), 1), ("dinov2", (28, 126), 2),
  ("registers", (70, 70), 2), ("registers", (112, 56), None),
  ("registers", (28, 126), 1),
])  # fmt: skip
def test_middle_layers_equal_transformers(kind, size, layer, references):
  reference, path = references[kind]
  model, params = interop.load(str(path), layer=layer)
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, *size, 3)).astype(np.float32)
  theirs = states(reference, image, model.config.num_registers)
  kept = len(theirs) - 1 if layer is None else layer + 1
  assert params["blocks"]["scale1"].shape == (kept, 48)
  ours = jax.jit(lambda x: model.apply({"params": params}, x))(image)
  assert np.abs(theirs[kept]).max() > 1
  assert np.abs(ours - theirs[kept]).max() <= 1e-5
  # The layers beside it are visibly others.
  assert np.abs(ours - theirs[kept - 1]).max() > 1e-2


def test_every_tensor_comes_back_to_the_bit(references):
  _, path = references["dinov2"]
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  _, params = interop.load(str(path))
  exported = mapping.export_tree(params, interop.table)
  left = {k for k in tensors if re.fullmatch(interop.ignored(4, 4), k)}
  assert left == {
    "layernorm.weight", "layernorm.bias", "embeddings.mask_token",
  }  # fmt: skip
  assert exported.keys() == tensors.keys() - left
  # On disk the names are the old ones, unlike those of `state_dict()`.
  assert "encoder.layer.0.attention.attention.query.weight" in exported
  for name, tensor in exported.items():
    np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_weights_go_straight_to_their_shards(references):
  _, path = references["registers"]
  mesh = create_mesh({"fsdp": 4, "tensor": 2})
  _, whole = interop.load(str(path), layer=1)
  _, split = interop.load(
    str(path), layer=1, param_dtype=jnp.bfloat16,
    shardings=lambda tree: tree_shardings(tree, SHARDING_RULES, mesh),
  )  # fmt: skip
  spec = split["blocks"]["fc1"]["kernel"].sharding.spec
  assert spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b),
    whole, split,
  )  # fmt: skip


def test_the_large_preset_is_the_public_model():
  config = PRESETS["dinov2_large"]
  # The fields of facebook/dinov2-large that differ from the class's.
  published = transformers.Dinov2Config(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
    image_size=518,
  )  # fmt: skip
  assert interop.config(json.loads(published.to_json_string())) == config
  with torch.device("meta"):
    theirs = transformers.Dinov2Model(published).state_dict()
  left = {k for k in theirs if re.fullmatch(interop.ignored(24, 24), k)}
  mine = interop.abstract_params(DINOv2(config))
  size = sum(leaf.size for leaf in jax.tree.leaves(mine))
  assert size + sum(theirs[k].numel() for k in left) == sum(
    v.numel() for v in theirs.values()
  )
  assert size == 304_368_640 - 3 * 1024
  names = [
    interop.table(path_name(p)).name.format(layer=i)
    for p, leaf in jax.tree_util.tree_leaves_with_path(mine)
    for i in range(leaf.shape[0] if "blocks" in path_name(p) else 1)
  ]
  assert len(set(names)) == len(names) == len(theirs) - len(left)
  middle = interop.abstract_params(DINOv2(upto(config, 16)))
  assert middle["blocks"]["scale1"].shape == (17, 1024)


@pytest.mark.parametrize("field, value, message", [
  ("model_type", "vit", "of a vit model"),
  ("hidden_act", "gelu_new", "hidden_act"),
  ("use_swiglu_ffn", True, "use_swiglu_ffn"),
  ("qkv_bias", False, "qkv_bias"),
  ("num_channels", 4, "num_channels"),
  ("hidden_size", None, "hidden_size"),
  ("mlp_ratio", "4", "mlp_ratio='4'"),
  ("image_size", [70, 56], "square"),
  ("patch_size", 0, "patch_size=0"),
])  # fmt: skip
def test_unsupported_configs_are_named(field, value, message, references):
  path = references["dinov2"][1] / "config.json"
  published = json.loads(path.read_text())
  interop.config(published)
  published[field] = value
  with pytest.raises(InputError, match=message):
    interop.config(published)
  del published[field]
  if field in ("model_type", "hidden_size"):
    with pytest.raises(InputError):
      interop.config(published)


def test_wrong_requests_are_named(references):
  with pytest.raises(InputError, match="layer 4 does not exist"):
    interop.load(str(references["dinov2"][1]), layer=4)
  for path in ("blocks/fc3/kernel", "norm/scale"):
    with pytest.raises(InputError, match=path):
      interop.table(path)


def test_random_features_warn_loudly(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text: said.append(text))
  model, params = interop.random_features(
    jax.random.key(0), upto(PRESETS["tiny"], 0)
  )
  assert "RANDOM FEATURES" in said[0]
  image = np.zeros((1, 14, 14, 3), np.float32)
  assert np.isfinite(model.apply({"params": params}, image)).all()
