# SPDX-License-Identifier: Apache-2.0
"""The offline pipeline: five verbs over shards, run by Apache Beam."""
