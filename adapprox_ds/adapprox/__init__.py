# SPDX-License-Identifier: Apache-2.0
"""Adapprox: its optimizer, its settings and state, the step, and how factors are moved."""
