# SPDX-License-Identifier: Apache-2.0
"""MicroAdam: its optimizer, settings and state, a window of gradients and their error feedback."""
