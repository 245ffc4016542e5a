# SPDX-License-Identifier: Apache-2.0
"""Our modules equal diffusers' classes on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.conditioning.layout import build_layout, num_slots
from qi2_jax.errors import InputError
from qi2_jax.interop import mapping
from qi2_jax.interop import mmdit as mmdit_table
from qi2_jax.interop import vae as vae_table
from qi2_jax.models.condition import Conditioning
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.models.vae import VAE, VAEConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MMDIT = MMDiTConfig(
  num_layers=3, num_heads=2, head_dim=32, context_dim=48,
  rope_axes=(8, 12, 12), latent_channels=8,
)  # fmt: skip
VAE_CONFIG = VAEConfig(
  base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=(1, 2, 4, 8, 8),
)  # fmt: skip
PATCHED = VAEConfig(
  patch_size=4, base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=(1, 2, 2),
  num_res_blocks=1, temporal_downsample=(False, True),
)  # fmt: skip


def relative(ours, theirs):
  theirs = np.asarray(theirs)
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def randomise(model, seed):
  """Fills every parameter, norms included, so that none can hide.

  Matrices keep the scale of their input, so that activations stay O(1) and
  the comparison is not one of rounding errors.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      norm = "norm" in name or "gamma" in name
      fan_in = p[0].numel() if p.ndim > 1 else 25
      p.copy_(p + 0.2 * noise if norm else noise / fan_in**0.5)
  return model.eval()


def state_dict(model):
  return {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def torch_mmdit():
  c = MMDIT
  return randomise(
    diffusers.QwenImage21Transformer2DModel(
      in_channels=c.latent_channels, out_channels=c.latent_channels,
      num_layers=c.num_layers, attention_head_dim=c.head_dim,
      num_attention_heads=c.num_heads, context_in_dim=c.context_dim,
      axes_dims_rope=c.rope_axes,
    ),
    0,
  )  # fmt: skip


def conditioning(text, refs_BRZ, is_slot, grids, target, length):
  """Pads the text to `length` and lays every sample out."""
  layout = build_layout(is_slot, grids, target, length)
  batch = text.shape[0]
  layout = jax.tree.map(
    lambda x: jnp.asarray(np.broadcast_to(x[None], (batch, *x.shape))), layout
  )
  pad = ((0, 0), (0, length - text.shape[1]), (0, 0))
  return Conditioning(
    jnp.asarray(np.pad(text, pad)), jnp.asarray(refs_BRZ), layout
  )


CASES = {
  "t2i": ((), (4, 6)),
  "one_reference": (((4, 6),), (6, 4)),
  "two_references": (((2, 4), (6, 2)), (4, 4)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [0, 5])
def test_mmdit_equals_diffusers(name, padding, torch_mmdit):
  grids, target = CASES[name]
  rng = np.random.default_rng(1)
  is_slot = [False] * 2
  for grid in grids:
    is_slot += [False] + [True] * num_slots(grid) + [False]
  is_slot += [False] * 3
  text = rng.normal(size=(2, len(is_slot), MMDIT.context_dim)) * 3
  text = text.astype(np.float32)
  count = sum(h * w for h, w in grids)
  z = MMDIT.latent_channels
  refs = rng.normal(size=(2, count, z)).astype(np.float32)
  x = rng.normal(size=(2, target[0] * target[1], z)).astype(np.float32)
  sigma = np.array([0.3, 0.9], np.float32)
  shapes = [(1, *g) for g in (*grids, target)]
  slots = is_slot + [True] * num_slots(target)
  with torch.no_grad():
    theirs = torch_mmdit(
      hidden_states=torch.tensor(np.concatenate([refs, x], 1)),
      encoder_hidden_states=torch.tensor(text),
      timestep=torch.tensor(sigma),
      img_shapes=[shapes] * 2,
      img_mask=torch.tensor([slots] * 2),
      return_dict=False,
    )[0][:, -x.shape[1] :].numpy()
  cond = conditioning(
    text, refs, is_slot, grids, target, len(is_slot) + padding
  )
  model = MMDiT(MMDIT)
  abstract = jax.eval_shape(model.init, jax.random.key(0), x, sigma, cond)
  params = mapping.import_tree(
    state_dict(torch_mmdit), abstract["params"], mmdit_table.table
  )
  ours = model.apply({"params": params}, x, sigma, cond)
  assert relative(ours, theirs) <= 1e-5
  cache = model.apply({"params": params}, cond, method="prefix_cache")
  cached = model.apply(
    {"params": params}, x, sigma, cache, cond.layout, method="decode"
  )
  assert relative(cached, theirs) <= 1e-5


def torch_vae(cfg):
  channels = cfg.image_channels * cfg.patch_size**2
  return randomise(
    diffusers.AutoencoderKLQwenImage21(
      base_dim=cfg.base_dim, decoder_base_dim=cfg.decoder_base_dim,
      z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult),
      num_res_blocks=cfg.num_res_blocks, is_residual=True,
      temperal_downsample=list(cfg.temporal_downsample),
      in_channels=channels, out_channels=channels,
      patch_size=cfg.patch_size if cfg.patch_size > 1 else None,
      latents_mean=[0.0] * cfg.z_dim, latents_std=[1.0] * cfg.z_dim,
    ),
    2,
  )  # fmt: skip


@pytest.mark.parametrize("cfg", [VAE_CONFIG, PATCHED], ids=["f16", "patched"])
@pytest.mark.parametrize("size", [(32, 32), (32, 80)])
def test_vae_equals_diffusers(cfg, size):
  reference = torch_vae(cfg)
  rng = np.random.default_rng(3)
  x = rng.uniform(-1, 1, (2, *size, 4)).astype(np.float32)
  nchw = torch.tensor(x.transpose(0, 3, 1, 2)[:, :, None])
  with torch.no_grad():
    moments = reference.encode(nchw).latent_dist
    mean = moments.mean[:, :, 0].numpy().transpose(0, 2, 3, 1)
    z = torch.tensor(rng.normal(size=moments.mean.shape).astype(np.float32))
    decoded = reference.decode(z).sample[:, :, 0].numpy()
  model = VAE(cfg)
  abstract = jax.eval_shape(model.init, jax.random.key(0), x)
  merged = vae_table.merge(abstract["params"], abstract.get("carried", {}))
  tensors = state_dict(reference)
  tree = mapping.import_tree(tensors, merged, vae_table.table)
  params, carried = vae_table.split(tree)
  variables = {"params": params, "carried": carried}
  variables["latent_stats"] = {
    "mean": jnp.zeros(cfg.z_dim), "std": jnp.ones(cfg.z_dim),
  }  # fmt: skip
  assert relative(model.apply(variables, x, method="encode"), mean) <= 1e-5
  z_nhwc = z[:, :, 0].numpy().transpose(0, 2, 3, 1)
  ours = model.apply(variables, jnp.asarray(z_nhwc), method="decode")
  assert relative(ours, decoded.transpose(0, 2, 3, 1)) <= 1e-5
  exported = mapping.export_tree(tree, vae_table.table)
  assert exported.keys() == tensors.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_wrong_checkpoints_are_named(torch_mmdit):
  tensors = state_dict(torch_mmdit)
  x = jnp.zeros((1, 4, MMDIT.latent_channels))
  cond = conditioning(
    np.zeros((1, 3, MMDIT.context_dim), np.float32),
    np.zeros((1, 0, MMDIT.latent_channels), np.float32),
    [False] * 3, (), (2, 2), 3,
  )  # fmt: skip

  def load(tensors, config=MMDIT):
    abstract = jax.eval_shape(
      MMDiT(config).init, jax.random.key(0), x, jnp.ones((1,)), cond
    )
    return mapping.import_tree(tensors, abstract["params"], mmdit_table.table)

  missing = {k: v for k, v in tensors.items() if k != "img_in.weight"}
  with pytest.raises(InputError, match=r"no tensor img_in\.weight"):
    load(missing)
  with pytest.raises(InputError, match="no place"):
    load({**tensors, "extra.weight": np.zeros(1)})
  with pytest.raises(InputError, match="has shape"):
    load({**tensors, "img_in.weight": np.zeros((3, 3), np.float32)})
  with pytest.raises(InputError, match="no place"):
    load(tensors, dataclasses.replace(MMDIT, num_layers=2))
