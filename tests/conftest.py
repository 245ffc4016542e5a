# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices, strict rank promotion, exact matmuls.

Compiled programs are kept in the project's pytest cache: several tests build
the same ones, and compiling is most of the suite's time.
"""

import pathlib

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
