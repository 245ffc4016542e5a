# SPDX-License-Identifier: Apache-2.0
"""Names and layouts of diffusers/transformers checkpoints."""
