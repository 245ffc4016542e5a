# SPDX-License-Identifier: Apache-2.0
"""Metrics of single records on the CPU, and the decisions made from them."""
