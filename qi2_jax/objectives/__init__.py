# SPDX-License-Identifier: Apache-2.0
"""Pure loss functions: arrays in, per-example values out."""
