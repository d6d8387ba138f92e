# SPDX-License-Identifier: Apache-2.0
"""Numerics of one matrix: S-RSI, rank control and the factored second moment. Imports torch alone."""
