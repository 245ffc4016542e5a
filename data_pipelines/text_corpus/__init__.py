# SPDX-License-Identifier: Apache-2.0
"""Images full of small text, to train and judge a VAE on."""
