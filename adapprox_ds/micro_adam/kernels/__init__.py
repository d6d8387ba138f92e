# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step in plain torch, C++ and Triton behind one interface (windows.py)."""
