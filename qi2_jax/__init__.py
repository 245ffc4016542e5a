# SPDX-License-Identifier: Apache-2.0
"""JAX/Flax training stack for the Qwen-Image-2.x family."""

__version__ = "0.1.0"
