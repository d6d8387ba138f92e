# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that travel: DeepSpeed's universal format with the second moment kept as factors."""

from adapprox_ds.checkpoint import factored, viewed, windowed  # noqa: F401  # each registers itself
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.finished import last_finished
from adapprox_ds.checkpoint.load import load_universal
from adapprox_ds.checkpoint.universal import convert

__all__ = ["CheckpointError", "convert", "last_finished", "load_universal"]
