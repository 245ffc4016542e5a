# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices, strict rank promotion, exact matmuls."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
