# SPDX-License-Identifier: Apache-2.0
"""Inputs of the offline pipeline: folders, JSONL, tars, Parquet, datasets."""
