# SPDX-License-Identifier: Apache-2.0
"""What one chip can do, for plans and rooflines.

Source: Google Cloud's TPU documentation, pages "TPU v5e", "TPU v5p" and
"TPU v6e" (read in 2026): peak bf16 compute, HBM bandwidth, and the inter-chip
bandwidth per chip (400, 1200 and 800 GB/s over both directions; halved here,
because a collective is bound by what one direction carries). The HBM limit is
what libtpu's compiler grants a program (its out-of-memory message names it);
it is below the nominal 16, 95 and 32 GB where the runtime keeps a part.
"""

import dataclasses

from qi2_jax.errors import InputError
from qi2_jax.parallel import hlo_costs

# What crosses a chip's links per byte of the whole array, on rings: a sum
# goes round twice. Kinds that are not listed once.
_RING_PASSES = {"all-reduce": 2, hlo_costs.PADDED_GATHER: 2}
ASSUMPTIONS = (
  "the slowest of three, each at its peak and all of them overlapped: matrix "
  "products at the chip's bf16 peak; HBM: every product reads its operands "
  "and writes its result once, the state is read and written once; links: "
  "ring collectives over all links of the chip in one direction, sums twice. "
  "Elementwise work, latency and the loader are left out, so a real step is "
  "slower. MFU counts model FLOPs, without recomputation. step_seconds_serial "
  "is the sum of the three: nothing overlapped"
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of one chip.

  Attributes:
    peak_flops: bf16 matrix FLOP/s.
    hbm_gib: memory that a program may use, GiB.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s into the chip over all of its links.
  """

  peak_flops: float
  hbm_gib: float
  hbm_bandwidth: float
  ici_bandwidth: float


CHIPS = {
  "v5e": Chip(197e12, 15.75, 819e9, 200e9),
  "v5p": Chip(459e12, 95.74, 2765e9, 600e9),
  "v6e": Chip(918e12, 31.25, 1600e9, 400e9),
}


def chip_of(topology: str) -> Chip:
  """The chip of a topology such as `v5p:4x4x4`.

  Raises:
    InputError: the generation is not in `CHIPS`.
  """
  generation = topology.partition(":")[0]
  if generation not in CHIPS:
    raise InputError(
      f"topology {topology!r} is unknown; use {sorted(CHIPS)} with a shape, "
      "e.g. v5p:4x4x4 or v5e:16x16."
    )
  return CHIPS[generation]


def roofline(
  chip: Chip, flops: float, model_flops: float, hbm_bytes: float,
  collectives: dict,
) -> dict:  # fmt: skip
  """Step time and MFU under `ASSUMPTIONS`; all inputs are per chip."""
  sent = sum(
    _RING_PASSES.get(kind, 1) * value["bytes"]
    for kind, value in collectives.items()
  )
  seconds = {
    "compute": flops / chip.peak_flops,
    "hbm": hbm_bytes / chip.hbm_bandwidth,
    "links": sent / chip.ici_bandwidth,
  }
  slowest = max(seconds, key=seconds.get)
  step = seconds[slowest]
  return {
    "roofline_seconds": seconds,
    "step_seconds_roofline": step,
    "step_seconds_serial": sum(seconds.values()),
    "mfu_roofline": model_flops / (step * chip.peak_flops),
    "mfu_serial": model_flops / (sum(seconds.values()) * chip.peak_flops),
    "bound_by": slowest,
    "roofline_assumptions": ASSUMPTIONS,
  }
