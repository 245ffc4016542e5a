# SPDX-License-Identifier: Apache-2.0
"""Host side of a prompt: templates, tokens, images, token layout."""
