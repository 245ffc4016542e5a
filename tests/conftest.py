# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices, strict rank promotion, exact matmuls.

Compiled programs are kept in the project's pytest cache: several tests build
the same ones, and compiling is most of the suite's time.
"""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture(scope="module")
def one_device():
  """Training runs on one device: eight would make small programs slower."""
  from qi2_jax.parallel import mesh as mesh_lib

  original = mesh_lib.create_mesh
  one = jax.devices()[:1]
  mesh_lib.create_mesh = lambda spec, devices=None: original(spec, one)
  yield
  mesh_lib.create_mesh = original
