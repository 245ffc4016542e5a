# SPDX-License-Identifier: Apache-2.0
"""Shapes and glyphs: rendered training data and the exact test of it."""
