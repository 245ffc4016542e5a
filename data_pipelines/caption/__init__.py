# SPDX-License-Identifier: Apache-2.0
"""Captions by a vision-language model: prompts, checks, routing, a client."""
