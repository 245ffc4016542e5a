# SPDX-License-Identifier: Apache-2.0
"""The training reader: aspect buckets, mixture, deterministic resume."""
