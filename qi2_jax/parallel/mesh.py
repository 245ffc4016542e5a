# SPDX-License-Identifier: Apache-2.0
"""One mesh builder: axes (data, fsdp, seq, tensor), any of which may be 1.

A laptop is the 1x1x1x1 mesh, so the single-device path is the pod path.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qi2_jax.errors import InputError

AXES = ("data", "fsdp", "seq", "tensor")


def axis_sizes(spec: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Resolves one -1 in `spec` so that the product is `num_devices`.

  Args:
    spec: axis name -> size; absent axes are 1; at most one size is -1.
    num_devices: the number of devices to fill.

  Raises:
    InputError: for an unknown axis or sizes that do not fill the devices.
  """
  unknown = set(spec) - set(AXES)
  if unknown:
    raise InputError(
      f"mesh has unknown axes {sorted(unknown)}; the axes are {list(AXES)}."
    )
  sizes = [int(spec.get(axis, 1)) for axis in AXES]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise InputError(
      f"mesh {dict(spec)} must have positive sizes and at most one -1."
    )
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if int(np.prod(sizes)) != num_devices:
    raise InputError(
      f"mesh {dict(zip(AXES, sizes))} does not fill {num_devices} devices; "
      "change config.mesh (use -1 for one axis to take the rest)."
    )
  return tuple(sizes)


def create_mesh(spec: Mapping[str, int], devices=None) -> Mesh:
  """Builds the mesh over `devices` (default: all of them).

  Hardware order comes from `mesh_utils`, which keeps neighbours on the fast
  links. Of several slices (TPU pods joined by the data-centre network) each
  holds whole fsdp, seq and tensor axes; only the data axis crosses them. Axes
  are `Auto`: shardings are constraints for the partitioner.

  Raises:
    InputError: the sizes do not fill the devices, or the data axis does not
      divide over the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(spec, len(devices))
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if sizes[0] % slices:
    raise InputError(
      f"the mesh has data={sizes[0]} but the devices are {slices} slices; set "
      "config.mesh.data to a multiple of that."
    )
  if slices == 1:
    grid = mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices,
      allow_split_physical_axes=True,
    )  # fmt: skip
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
