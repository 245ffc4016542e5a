# SPDX-License-Identifier: Apache-2.0
"""The feature cache: latents and text states in the place of images."""
