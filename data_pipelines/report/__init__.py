# SPDX-License-Identifier: Apache-2.0
"""The page that shows people what a stage of the pipeline did."""
