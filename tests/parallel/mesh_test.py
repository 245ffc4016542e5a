# SPDX-License-Identifier: Apache-2.0
"""Axis resolution and the mesh over eight simulated devices."""

import jax
import numpy as np
import pytest

from qi2_jax.errors import InputError
from qi2_jax.parallel.mesh import AXES, axis_sizes, create_mesh


@pytest.mark.parametrize("spec, sizes", [
  ({}, (1, 1, 1, 1)),
  ({"data": -1}, (1, 1, 1, 1)),
])  # fmt: skip
def test_one_device_is_the_unit_mesh(spec, sizes):
  assert axis_sizes(spec, 1) == sizes


@pytest.mark.parametrize("spec, sizes", [
  ({"fsdp": -1}, (1, 8, 1, 1)),
  ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
  ({"data": -1, "seq": 8}, (1, 1, 8, 1)),
  ({"data": 4, "seq": 2}, (4, 1, 2, 1)),
])  # fmt: skip
def test_the_rest_goes_to_the_open_axis(spec, sizes):
  assert axis_sizes(spec, 8) == sizes
  mesh = create_mesh(spec)
  assert mesh.axis_names == AXES and mesh.devices.shape == sizes
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("spec, message", [
  ({"model": 2}, r"unknown axes \['model'\]"),
  ({"data": -1, "fsdp": -1}, "at most one -1"),
  ({"data": 0}, "positive sizes"),
  ({"data": -2}, "positive sizes"),
  ({"data": 3}, "does not fill 8 devices"),
  ({"data": 3, "fsdp": -1}, "does not fill 8 devices"),
  ({}, "does not fill 8 devices"),
])  # fmt: skip
def test_impossible_meshes_are_named(spec, message):
  with pytest.raises(InputError, match=message):
    axis_sizes(spec, 8)


def test_a_mesh_takes_the_devices_it_is_given():
  mesh = create_mesh({"fsdp": 2, "data": -1}, jax.devices()[:4])
  assert mesh.devices.shape == (2, 2, 1, 1)
  assert len(np.unique([d.id for d in mesh.devices.flat])) == 4


class Chip:
  """A chip of a slice, as far as a mesh looks at it."""

  platform, device_kind, process_index = "tpu", "made up", 0

  def __init__(self, number, per_slice):
    self.id, self.slice_index = number, number // per_slice
    self.coords, self.core_on_chip = (number % per_slice, 0, 0), 0


def test_only_the_data_axis_crosses_slices():
  chips = [Chip(i, 4) for i in range(8)]
  mesh = create_mesh({"data": 4, "fsdp": 2}, chips)
  slices = [{d.slice_index for d in mesh.devices[i].flat} for i in range(4)]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(InputError, match="data=1 but the devices are 2 slices"):
    create_mesh({"fsdp": 8}, chips)
