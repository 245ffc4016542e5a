# SPDX-License-Identifier: Apache-2.0
"""ml_collections configs, one file per stage."""
