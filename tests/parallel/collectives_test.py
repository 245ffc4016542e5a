# SPDX-License-Identifier: Apache-2.0
"""What a compiled training step moves between devices, and stores at most."""

import math

import jax
import pytest

from experiments import pretrain
from qi2_jax.models import attention, mmdit
from qi2_jax.parallel import hlo, hlo_costs
from qi2_jax.parallel.mesh import create_mesh
from qi2_jax.training import program

LAYERS = mmdit.PRESETS["tiny"].num_layers


def compiled_step(spec, side: int):
  """The parsed step of the tiny pre-training on images of `side` px."""
  config = pretrain.get_config("tiny")
  config.data.buckets, config.data.batch_size = ((side, side),), 8
  mesh = create_mesh(spec, jax.devices()[: math.prod(spec.values())])
  lowered, facts = program.lower_step(config, mesh, platforms=("cpu",))
  return hlo.parse(lowered.compile().as_text()), facts


def reduced_arrays(module):
  """Every array that devices sum, as `(times, array)`."""
  for times, name, i in module.executed():
    if i.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter"):
      body = module.computations[name]
      for operand in i.operands:
        yield from ((times, array) for array in body[operand].arrays)


def kernels() -> set[tuple[int, ...]]:
  """Shapes of the stacked kernels of all blocks, `[L, ...]`."""
  model = mmdit.MMDiT(mmdit.PRESETS["tiny"])
  shapes = jax.eval_shape(lambda: mmdit.init_params(model, jax.random.key(0)))
  return {x.shape for x in jax.tree.leaves(shapes["blocks"]) if x.ndim > 2}


@pytest.mark.parametrize("spec", [
  {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2},
])  # fmt: skip
def test_gradients_of_all_layers_are_never_whole(spec):
  """Each layer's is summed in its turn of the loop, and its part kept.

  The CPU's compiler writes a reduce-scatter as the sum of one layer and a
  slice of it; which of the two a TPU gets is in its own program (`aot`).
  """
  module, _ = compiled_step(spec, 64)
  sums = list(reduced_arrays(module))
  largest = max(math.prod(shape[1:]) for shape in kernels())
  in_turn = [math.prod(a.dims) for times, a in sums if times == LAYERS]
  assert largest // spec.get("tensor", 1) in in_turn
  assert max(math.prod(a.dims) for _, a in sums) <= largest
  stored = {a.dims for _, _, i in module.executed() for a in i.arrays}
  assert not stored & kernels()


def scores(module, lengths) -> list[hlo.Array]:
  """Stored arrays with two axes as long as a whole sequence."""
  return [
    array
    for _, name, i in module.executed()
    for array in i.arrays
    if name not in module.fused and sum(d in lengths for d in array.dims) > 1
  ]


def test_no_buffer_holds_the_scores_of_whole_sequences(monkeypatch):
  """Target of four chunks, forward and backward, per layer and stacked."""
  monkeypatch.setattr(attention, "CHUNK", 64)
  module, facts = compiled_step({"data": 1}, 256)
  tokens = facts["tokens"]
  assert tokens["target"] == 4 * attention.CHUNK
  lengths = {tokens["target"], sum(tokens.values())}
  assert not scores(module, lengths)
  # The largest is an activation: the MLP's, of all layers.
  preset = mmdit.PRESETS["tiny"]
  mlp = sum(tokens.values()) * preset.width * preset.mlp_ratio
  largest = hlo_costs.largest_buffers(module, 1)[0]
  assert math.prod(largest.dims) == LAYERS * facts["global_batch"] * mlp
  # The other way round: in one chunk they are there, and they are seen.
  monkeypatch.setattr(attention, "CHUNK", 1024)
  assert scores(compiled_step({"data": 1}, 256)[0], lengths)
