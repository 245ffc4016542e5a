# SPDX-License-Identifier: Apache-2.0
"""Arrays and tensors as raw integers: bit equality, NaNs included."""

import numpy as np


def bits(array):
  """A numpy or jax array as unsigned integers of the same width."""
  array = np.asarray(array)
  return array.view(f"u{array.dtype.itemsize}")


def torch_bits(tensor):
  """A torch tensor of any type as a numpy array of unsigned integers."""
  import torch

  kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
  raw = tensor.contiguous().view(kinds[tensor.element_size()]).numpy()
  return raw.view(f"u{tensor.element_size()}")


def assert_equal_modules(a, b):
  """Two state dicts hold the same names, types and bits."""
  a, b = a.state_dict(), b.state_dict()
  assert a.keys() == b.keys()
  for name, tensor in a.items():
    assert tensor.dtype == b[name].dtype, name
    np.testing.assert_array_equal(
      torch_bits(tensor), torch_bits(b[name]), err_msg=name
    )
