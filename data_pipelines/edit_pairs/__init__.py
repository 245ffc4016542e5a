# SPDX-License-Identifier: Apache-2.0
"""Edit pairs from pictures and cut-outs, with exact preservation masks."""
