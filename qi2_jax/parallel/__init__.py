# SPDX-License-Identifier: Apache-2.0
"""Mesh, parameter rules, activation constraints, host batches."""
