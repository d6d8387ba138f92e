# SPDX-License-Identifier: Apache-2.0
"""Numerics of one matrix: S-RSI, rank control, the factored moment. Imports torch alone."""
