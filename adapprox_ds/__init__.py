# SPDX-License-Identifier: Apache-2.0
"""Adapprox and MicroAdam for DeepSpeed: Adams of little memory that work on ZeRO's flat shards."""

from adapprox_ds._version import __version__
from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.checkpoint import convert, load_universal
from adapprox_ds.matrix_views import MatrixViews
from adapprox_ds.micro_adam.optimizer import MicroAdam
from adapprox_ds.zero.register import attach, initialize, register

__all__ = [
    "Adapprox",
    "MatrixViews",
    "MicroAdam",
    "__version__",
    "attach",
    "convert",
    "initialize",
    "load_universal",
    "register",
]
