# SPDX-License-Identifier: Apache-2.0
"""The training step of a config as a program, without weights or data.

`train` runs what is built here and `aot` compiles it for pods that are not
there, so the report is about the very step that training runs. Everything is
abstract: shapes, dtypes and shardings.

Shapes: B batch, N target tokens, T encoder tokens, R reference latents,
P prefix tokens, C encoder width, Z latent channels.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.conditioning import encoder
from qi2_jax.conditioning.layout import num_slots, prefix_length
from qi2_jax.models import mmdit, mmdit_flops, vae
from qi2_jax.models.condition import Conditioning, Layout
from qi2_jax.parallel import sharding
from qi2_jax.training import build, health, optimizer, state, steps

Grid = tuple[int, int]
# With this each product of a gradient hands partial sums around a ring: a
# reduce-scatter that overlaps with the product. Without it libtpu sums whole
# gradients on every chip. A long ring cuts products into slices that are too
# thin for the chip, so there whole sums are the lesser evil (docs/scale.md).
_RINGS = {"xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd"}
_LONGEST_RING = 32


def gradient_training(config, loss: steps.Loss) -> tuple[Callable, Callable]:
  """A run that follows the gradient of one loss.

  Args:
    config: its `optimizer`, `num_steps` and `ema_decay`.
    loss: of the task.

  Returns:
    `(params -> state, step)`, see `task.Task`.
  """
  tx = optimizer.create(config.optimizer, config.num_steps)
  step = steps.make_step(
    loss, tx, config.ema_decay, config.optimizer.accumulate
  )
  return functools.partial(state.create, optimizer=tx), step


def abstract_state(
  init: Callable, start: Callable, rules: sharding.Rules, mesh
):  # fmt: skip
  """The train state's shapes, dtypes and shardings.

  Args:
    init: `key -> params`; traced, never run.
    start: `params -> state`; likewise.
    rules: sharding rules of the state.
    mesh: where the state lives.

  Returns:
    The state with `jax.ShapeDtypeStruct` for arrays.

  Raises:
    InputError: a parameter has no sharding rule.
  """
  abstract = jax.eval_shape(lambda: start(init(jax.random.key(0))))
  return sharding.on_mesh(abstract, rules, mesh)


def shardings_of(tree):
  """The shardings of a train state, abstract or not."""
  return jax.tree.map(lambda x: x.sharding, tree)


def compiler_options(mesh) -> dict[str, str]:
  """What the compiler must be told for a step on `mesh`."""
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  short = mesh.shape["fsdp"] <= _LONGEST_RING
  return dict(_RINGS) if on_tpu and short else {}


def jit_step(step: Callable, shardings, mesh):
  """The jitted step of a task: donates the state, pins every sharding.

  Args:
    step: pure, see `task.Task`; a non-finite one will change nothing.
    shardings: of the state, in and out.
    mesh: features are split over its data and fsdp axes.

  Returns:
    `step(state, features, key) -> (state, metrics)`.
  """
  step = health.skip_nonfinite(step)
  by_batch = sharding.batch_sharding(mesh)

  def pinned(train_state, features, key):
    # The compiler chose the layout of `encode`'s outputs; without this the
    # step that runs could differ from the one that was planned.
    rows, frozen = steps.rows_of(features)
    rows = jax.lax.with_sharding_constraint(rows, by_batch)
    return step(train_state, rows | frozen, key)

  return jax.jit(
    pinned, donate_argnums=0, out_shardings=(shardings, None),
    compiler_options=compiler_options(mesh),
  )  # fmt: skip


def flow_loss(config, module: mmdit.MMDiT) -> steps.Loss:
  """The flow-matching loss that `config.flow` describes."""
  shift = build.shift_config(config.flow.shift)
  return steps.flow_matching_loss(
    module, logit_mean=config.flow.logit_mean,
    logit_std=config.flow.logit_std,
    shift=shift if config.flow.shift_training else None,
  )  # fmt: skip


def abstract_features(
  config: mmdit.MMDiTConfig, batch: int, target: Grid, tokens: int,
  references: Sequence[Grid] = (), mesh=None,
) -> dict:  # fmt: skip
  """Features of one bucket, as `flow_task` encodes them.

  Args:
    config: of the MMDiT.
    batch: global batch size B.
    target: latent grid of the target.
    tokens: encoder tokens T, the slots and tags of references included.
    references: latent grids of the reference images.
    mesh: where the features lie; None leaves that open.

  Returns:
    `{"latents_BNZ", "condition"}` of `jax.ShapeDtypeStruct`.
  """
  place = sharding.batch_sharding(mesh) if mesh is not None else None

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place)

  prefix = prefix_length(tokens, references)
  count, channels = int(np.prod(target)), config.latent_channels
  latents = sum(h * w for h, w in references)
  layout = Layout(
    source_BP=array(prefix, dtype=jnp.int32),
    blocks_BP=array(prefix, dtype=jnp.int32),
    valid_BP=array(prefix, dtype=jnp.bool_),
    positions_BP3=array(prefix, 3, dtype=jnp.int32),
    target_positions_BN3=array(count, 3, dtype=jnp.int32),
  )
  condition = Conditioning(
    array(tokens, config.context_dim), array(latents, channels), layout
  )
  return {"latents_BNZ": array(count, channels), "condition": condition}


def planned_module(config, mesh) -> mmdit.MMDiT:
  """The MMDiT of a plan; its text states are as wide as the preset's."""
  z_dim = vae.PRESETS[config.vae.preset].z_dim
  context = mmdit.PRESETS[config.model.preset].context_dim
  platform = mesh.devices.flat[0].platform
  return mmdit.MMDiT(build.mmdit_config(config.model, z_dim, context, platform))


def largest_bucket(config) -> Grid:
  """(height, width) in pixels of the config's largest bucket by area."""
  return max(map(tuple, config.data.buckets), key=math.prod)


def largest_features(config, module: mmdit.MMDiT, references: int, mesh):
  """`abstract_features` of the config's largest bucket and whole batch.

  Args:
    config: of the run.
    module: the MMDiT.
    references: reference images per sample, of the bucket's size.
    mesh: where they lie.
  """
  factor = vae.PRESETS[config.vae.preset].factor
  grid = tuple(side // factor for side in largest_bucket(config))
  return abstract_features(
    module.config, config.data.batch_size, grid,
    _text_tokens(config.text, grid, references), (grid,) * references, mesh,
  )  # fmt: skip


def _text_tokens(config, grid, references: int) -> int:
  """Encoder tokens of a prompt; tags as the built-in tokenizer counts them."""
  if not references:
    return config.length
  slots = (num_slots(grid),) * references
  text_encoder, _ = encoder.built_in(config.width)
  return config.length + encoder.num_image_tokens(text_encoder, slots)


def tokens_of(features) -> mmdit_flops.Tokens:
  """Token counts of one sample of `abstract_features`."""
  condition = features["condition"]
  return mmdit_flops.Tokens(
    target=features["latents_BNZ"].shape[1],
    text=condition.text_BTC.shape[1],
    references=condition.references_BRZ.shape[1],
    prefix=condition.layout.source_BP.shape[1],
  )


def abstract_key(mesh):
  """A random key that every device has."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.ShapeDtypeStruct(
    key.shape, key.dtype, sharding=jax.NamedSharding(mesh, jax.P())
  )


def elements(tree) -> int:
  """Number of elements of all arrays."""
  return sum(x.size for x in jax.tree.leaves(tree))


def lower(step: Callable, train_state, features, mesh, platforms=("tpu",)):
  """Lowers a task's pure step for abstract arguments.

  Args:
    step: see `task.Task`.
    train_state: abstract, with shardings.
    features: likewise.
    mesh: over the devices of a topology.
    platforms: what to lower for.
  """
  jitted = jit_step(step, shardings_of(train_state), mesh)
  with jax.set_mesh(mesh):
    return jitted.trace(train_state, features, abstract_key(mesh)).lower(
      lowering_platforms=platforms
    )


def lower_step(config, mesh, references: int = 0, platforms=("tpu",)):
  """Lowers the training step of a config.

  Args:
    config: of a flow-matching stage.
    mesh: over the devices of a topology.
    references: reference images per sample, of the bucket's size.
    platforms: what to lower for.

  Returns:
    `(lowered, facts)`: facts are plain values about what was lowered.

  Raises:
    InputError: the batch does not divide over the mesh.
  """
  batch, parts = config.data.batch_size, config.optimizer.accumulate
  steps.check_batch(batch, parts, mesh)
  module = planned_module(config, mesh)
  start, step = gradient_training(config, flow_loss(config, module))
  train_state = abstract_state(
    functools.partial(mmdit.init_params, module), start, mmdit.SHARDING_RULES,
    mesh,
  )  # fmt: skip
  features = largest_features(config, module, references, mesh)
  tokens = tokens_of(features)
  work = mmdit_flops.step_flops(module.config, tokens, batch)
  facts = {
    "parameters": elements(train_state.params),
    "bucket": list(largest_bucket(config)),
    "references": references,
    "tokens": {"prefix": tokens.prefix, "target": tokens.target},
    "global_batch": batch,
    "accumulate": parts,
    "batch_per_chip": batch / parts / mesh.size,
    "mesh": dict(mesh.shape),
    "remat": module.config.remat,
    "kernel": module.config.kernel,
    "analytic_flops_per_step": work.executed,
    "model_flops_per_step": work.model,
  }
  return lower(step, train_state, features, mesh, platforms), facts
