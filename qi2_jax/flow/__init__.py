# SPDX-License-Identifier: Apache-2.0
"""Time convention, schedules, guidance and samplers."""
