# SPDX-License-Identifier: Apache-2.0
"""Flax modules and the free functions that hold their math."""
