# SPDX-License-Identifier: Apache-2.0
"""Offline and online data pipelines; free of jax and qi2_jax."""
