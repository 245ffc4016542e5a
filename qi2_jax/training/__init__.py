# SPDX-License-Identifier: Apache-2.0
"""State, optimizer, steps, checkpoints, metrics and the one loop."""
