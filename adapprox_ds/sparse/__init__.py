# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's state: a window of sparse gradients and the error that they leave behind."""
