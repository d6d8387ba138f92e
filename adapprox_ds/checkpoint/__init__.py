# SPDX-License-Identifier: Apache-2.0
"""Moves a run to another ZeRO stage or number of processes, with its compact optimizer state.

The files are DeepSpeed's universal format, in which the second moment is kept as factors.
"""

from adapprox_ds.checkpoint import factored, viewed, windowed  # noqa: F401  # each registers itself
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.finished import last_finished
from adapprox_ds.checkpoint.load import load_universal
from adapprox_ds.checkpoint.universal import convert

__all__ = ["CheckpointError", "convert", "last_finished", "load_universal"]
