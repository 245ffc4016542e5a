# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT and diffusers act in our model as they do in theirs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models

from qi2_jax.interop import lora as files
from qi2_jax.interop import mapping
from qi2_jax.interop import mmdit as mmdit_table
from qi2_jax.models import lora
from qi2_jax.models.mmdit import MMDiT, init_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CONFIG = tiny_models.MMDIT
MODEL = MMDiT(CONFIG)
TARGET = (4, 6)
COND = tiny_models.conditioning(CONFIG, words=(5, 5), target=TARGET)
LATENTS = tiny_models.noise(CONFIG, 2, TARGET)
SIGMA = jnp.array([0.3, 0.9])
SEVEN = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj",
         "img_mlp.gate_layer", "img_mlp.out"]  # fmt: skip


def noise_(model, keep, seed):
  """Fills the parameters whose name `keep` accepts with noise."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if keep(name):
        draw = torch.randn(p.shape, generator=generator)
        p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else p + 0.2 * draw)
  return model.eval()


@pytest.fixture(scope="module")
def base():
  c = CONFIG
  model = diffusers.QwenImage21Transformer2DModel(
    in_channels=c.latent_channels, out_channels=c.latent_channels,
    num_layers=c.num_layers, attention_head_dim=c.head_dim,
    num_attention_heads=c.num_heads, context_in_dim=c.context_dim,
    axes_dims_rope=c.rope_axes,
  )  # fmt: skip
  return noise_(model, lambda name: True, 0)


@pytest.fixture(scope="module")
def shapes():
  return jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def params(base, shapes):
  tensors = {k: v.numpy() for k, v in base.state_dict().items()}
  tree = mapping.import_tree(tensors, shapes, mmdit_table.table)
  return jax.tree.map(jnp.asarray, tree)


def adapted(base, seed=1, **fields):
  """A copy of the base with a random PEFT adapter in it."""
  config = peft.LoraConfig(**{"target_modules": SEVEN, **fields})
  model = copy.deepcopy(base)
  model.add_adapter(config, adapter_name="default")
  noise_(model, lambda name: "lora_" in name, seed)
  # A change below the size of the weights: above it the softmax saturates,
  # and both models round several times as much.
  for name, p in model.named_parameters():
    if "lora_B" in name:
      p.data *= 0.2
  return model


def theirs(model, **kwargs):
  slots = [False] * COND.text_BTC.shape[1] + [True] * 6
  return model(
    hidden_states=torch.tensor(np.asarray(LATENTS)),
    encoder_hidden_states=torch.tensor(np.asarray(COND.text_BTC)),
    timestep=torch.tensor(np.asarray(SIGMA)),
    img_shapes=[[(1, *TARGET)]] * 2,
    img_mask=torch.tensor([slots] * 2),
    return_dict=False,
    **kwargs,
  )[0][:, -LATENTS.shape[1] :]


@jax.jit
def ours(params, adapter, weight=1.0):
  merged = lora.merge(params, adapter, weight)
  return MODEL.apply({"params": merged}, LATENTS, SIGMA, COND)


SETTINGS = {
  "ranks_and_alphas": {
    "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, "img_mlp.out": 8},
    "alpha_pattern": {"transformer_blocks.1.attn.to_v": 5},
  },
  "ranks_by_layer": {
    "r": 4, "lora_alpha": 6,
    "rank_pattern": {r"transformer_blocks\.1\.attn\.to_k": 3},
  },
  "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
  "some_layers": {
    "r": 4, "lora_alpha": 12, "target_modules": r".*blocks\.1\.attn\.to_[qkv]",
  },
  "outside_the_blocks": {
    "r": 4, "lora_alpha": 6,
    "target_modules": ["img_in", "txt_in.in_layer", "txt_in.out_layer",
                       "linear_1", "linear_2", "modulation.1",
                       "norm_out.linear", "proj_out", "to_out.0"],
  },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_output_is_that_of_the_active_adapter(
  name, base, params, shapes, tmp_path
):
  model = adapted(base, **SETTINGS[name])
  model.save_lora_adapter(tmp_path)
  adapter = files.read(str(tmp_path), shapes)
  with torch.no_grad():
    plain = theirs(base).numpy()
    whole = theirs(model).numpy()
    half = theirs(model, attention_kwargs={"scale": 0.5}).numpy()
  assert tiny_models.relative(plain, whole) > 0.05
  assert tiny_models.relative(ours(params, adapter), whole) <= 1e-5
  assert tiny_models.relative(ours(params, adapter, 0.5), half) <= 1e-5
  # What we write acts the same again, in both layouts.
  for target in (tmp_path / "peft", tmp_path / "out.safetensors"):
    files.write(str(target), adapter)
    again = files.read(str(target), shapes)
    assert tiny_models.relative(ours(params, again), whole) <= 1e-5


def test_gradients_are_those_of_torch(base, params, shapes, tmp_path):
  model = adapted(base, r=4, lora_alpha=6)
  model.save_lora_adapter(tmp_path)
  adapter = files.read(str(tmp_path), shapes)
  goal = np.asarray(tiny_models.noise(CONFIG, 2, TARGET, seed=8))
  (theirs(model) - torch.tensor(goal)).square().mean().backward()

  def loss(adapter):
    return jnp.mean((ours(params, adapter) - goal) ** 2)

  grads = jax.grad(loss)(adapter)
  named = dict(model.named_parameters())
  # Gradients have the layout of the weights, so the exporter names them.
  tensors, _ = files._torch_layout(grads, "")
  assert len(tensors) == 28
  for key, ours_ in tensors.items():
    wanted = named[key.replace(".weight", ".default.weight")].grad.numpy()
    assert np.abs(wanted).max() > 0
    assert tiny_models.relative(ours_, wanted) <= 1e-4, key


def loaded(path):
  return safetensors.numpy.load_file(str(path))


def scalings(model):
  """alpha / rank of every adapted linear of a torch model."""
  layers = {n: m for n, m in model.named_modules() if hasattr(m, "scaling")}
  return {n: list(m.scaling.values()) for n, m in layers.items()}


def assert_same_tensors(one, other):
  assert one.keys() == other.keys()
  for key, value in one.items():
    assert value.dtype == other[key].dtype
    np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_folders_survive(dtype, base, shapes, tmp_path):
  config = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=SEVEN, rank_pattern={"to_q": 2},
    alpha_pattern={"transformer_blocks.1.img_mlp.out": 1.7},
  )  # fmt: skip
  model = peft.get_peft_model(copy.deepcopy(base), config)
  noise_(model, lambda name: "lora_" in name, 2)
  model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
  adapter = files.read(str(tmp_path / "in"), shapes)
  assert jax.tree.leaves(adapter.factors)[0].dtype == dtype
  files.write(str(tmp_path / "out"), adapter)
  first, second = (loaded(tmp_path / n / files.PEFT_WEIGHTS)
                   for n in ("in", "out"))  # fmt: skip
  assert len(first) == 28
  assert_same_tensors(first, second)
  again = peft.PeftModel.from_pretrained(
    copy.deepcopy(base).to(getattr(torch, dtype)), tmp_path / "out"
  )
  with torch.no_grad():
    if dtype == "float32":
      assert torch.equal(theirs(again), theirs(model))
  assert scalings(again) == scalings(model)
  # A file given by name still finds the alphas that lie beside it.
  direct = files.read(str(tmp_path / "in" / files.PEFT_WEIGHTS), shapes)
  jax.tree.map(np.testing.assert_array_equal, direct, adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_files_survive(dtype, base, shapes, tmp_path):
  pipeline = diffusers.QwenImage21Pipeline
  model = adapted(base, r=4, lora_alpha=6, rank_pattern={"to_q": 2})
  model.to(getattr(torch, dtype))
  pipeline.save_lora_weights(
    tmp_path,
    transformer_lora_layers=peft.get_peft_model_state_dict(model),
    transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
  )
  adapter = files.read(str(tmp_path), shapes)
  out = tmp_path / "out.safetensors"
  files.write(str(out), adapter)
  assert_same_tensors(loaded(tmp_path / files.DIFFUSERS_WEIGHTS), loaded(out))
  again = copy.deepcopy(base).to(getattr(torch, dtype))
  # The two halves of `load_lora_weights`, which needs a whole pipeline.
  state, metadata = pipeline.lora_state_dict(
    str(tmp_path), weight_name=out.name, return_lora_metadata=True
  )
  pipeline.load_lora_into_transformer(state, again, metadata=metadata)
  assert scalings(again) == scalings(model)
  if dtype == "float32":
    with torch.no_grad():
      assert torch.equal(theirs(again), theirs(model))
