# SPDX-License-Identifier: Apache-2.0
"""Estimates of memory, diagnostics of a machine or a run, and pictures of runs.

Nothing here changes an optimizer, and no other folder of the package imports this one.
"""
