# SPDX-License-Identifier: Apache-2.0
"""Adapprox for DeepSpeed: Adam with a low-rank second moment that works on ZeRO's flat shards."""

from adapprox_ds._version import __version__
from adapprox_ds.checkpoint import convert, load_universal
from adapprox_ds.optim.adapprox import Adapprox
from adapprox_ds.zero.register import attach, initialize, register

__all__ = [
    "Adapprox",
    "__version__",
    "attach",
    "convert",
    "initialize",
    "load_universal",
    "register",
]
