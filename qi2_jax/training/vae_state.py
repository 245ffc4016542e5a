# SPDX-License-Identifier: Apache-2.0
"""Train state of the VAE's recipe, and which of its parameters are trained.

Shapes: Z latent channels, D width of the features that latents align to.
"""

import re
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from qi2_jax.errors import InputError
from qi2_jax.models import vae

# Regexes of what is trained, by `config.trainable`. `decoder` leaves latents
# as they are. `middle` is DC-AE's way to adapt to high resolution (arXiv
# 2410.10733, section 3.2: encoder head and decoder input); where we cut is
# ours. The layers outside hold neither gradients nor moments of Adam.
PARTS = {
  "all": r".*",
  "decoder": r"(decoder|post_quant_conv)/.*",
  "middle": r"encoder/(mid|norm_out|conv_out)/.*|quant_conv/.*"
  r"|post_quant_conv/.*|decoder/(conv_in|mid)/.*",
}
# Beside the rules of the VAE: the projection is small.
SHARDING_RULES = ((r"(.*/)?projection_ZD", ()), *vae.SHARDING_RULES)


@flax.struct.dataclass
class VaeState:
  """What a step reads and writes.

  Attributes:
    step: int32 scalar, completed steps.
    params: of the VAE, trained or not.
    ema: exponential moving average of `params`.
    opt_state: optax state of the trained parameters and the projection.
    projection: `{"projection_ZD"}`, latents to the width of the features;
      empty without alignment. It has no place in an exported VAE.
  """

  step: jax.Array
  params: dict
  ema: dict
  opt_state: optax.OptState
  projection: dict


def check_part(part: str) -> None:
  """Raises InputError unless `part` is one of `PARTS`."""
  if part not in PARTS:
    raise InputError(
      f"config.trainable={part!r} is unknown; use one of {sorted(PARTS)}."
    )


def split(params: dict, part: str) -> tuple[dict, dict]:
  """`(trained, rest)` of the VAE's parameters, as nested dicts."""
  flat = traverse_util.flatten_dict(params, sep="/")
  chosen = {k for k in flat if re.fullmatch(PARTS[part], k)}
  trees = (
    {k: v for k, v in flat.items() if (k in chosen) == wanted}
    for wanted in (True, False)
  )
  trained, rest = (traverse_util.unflatten_dict(t, sep="/") for t in trees)
  return trained, rest


def merge(trained: dict, rest: dict) -> dict:
  """Inverse of `split`."""
  flat = (traverse_util.flatten_dict(tree) for tree in (trained, rest))
  return traverse_util.unflatten_dict(dict(k for f in flat for k in f.items()))


def new_projection(key: jax.Array, z_dim: int, width: int) -> dict:
  """A fresh projection, Lecun normal."""
  init = jax.nn.initializers.lecun_normal()
  return {"projection_ZD": init(key, (z_dim, width), jnp.float32)}


def creator(
  optimizer: optax.GradientTransformation, part: str,
  projection: Callable[[], dict],
) -> Callable:  # fmt: skip
  """`params -> VaeState`; the EMA starts at the parameters."""

  def create(params) -> VaeState:
    trained, _ = split(params, part)
    fresh = projection()
    return VaeState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      # Copies: a donated state may not hold one buffer twice.
      ema=jax.tree.map(jnp.copy, params),
      opt_state=optimizer.init({"vae": trained, "projection": fresh}),
      projection=fresh,
    )

  return create
