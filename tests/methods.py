# SPDX-License-Identifier: Apache-2.0
"""The optimizers' steps that training is tested with, and what their oracles are told."""

from __future__ import annotations

import math
from typing import Any

from tests.micro_oracle import MicroSettings
from tests.oracle import Settings

RANKS = {"rank_init": 3, "rank_max": 3, "rank_step": 1, "oversampling": 2, "lr": 1e-2}
#: Blocks that parameters have several of, and that ranks cut.
BLOCKS = {"block_size": 64, "quant_block_size": 16, "density": 0.1, "window": 4, "lr": 1e-2}
WIDE = {**BLOCKS, "window": 9, "density": 1.0, "quant_bits": 32}
#: The two steps that Adapprox has, the default's two passes and Algorithm 3 literally; MicroAdam.
METHODS: dict[str, tuple[dict[str, Any], Settings | MicroSettings]] = {
    "default": (
        RANKS,
        Settings(
            tracking=True,
            bias_correction=True,
            momentum="gradient",
            nesterov=True,
            clip=math.inf,
            floor=0.1,
        ),
    ),
    "clipped": (
        {**RANKS, "clip_threshold": 0.5, "floor": 0.0},
        Settings(tracking=True, bias_correction=True, momentum="gradient", nesterov=True, clip=0.5),
    ),
    "paper": ({**RANKS, "preset": "paper", "power_iterations": 2}, Settings()),
    "micro": (BLOCKS, MicroSettings(block=64, group=16, density=0.1, window=4)),
    "micro_full": (
        {**BLOCKS, "quant_bits": 32},
        MicroSettings(block=64, group=16, density=0.1, window=4, bits=32),
    ),
}
