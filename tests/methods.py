# SPDX-License-Identifier: Apache-2.0
"""The optimizers' steps that wrappers are tested with, and the oracles' settings for each."""

from __future__ import annotations

import math
from typing import Any

from tests.adapprox.oracle import Settings
from tests.micro_adam.micro_oracle import MicroSettings

#: Groups by parameter: matrices decay, the rest does not and has another rank bound.
DECAY = ("emb", "w1", "conv", "experts", "w2", "unused", "frozen", "empty")
RANKS = {"rank_init": 3, "rank_max": 3, "rank_step": 1, "oversampling": 2, "lr": 1e-2}
#: Blocks that parameters have several of, and that ranks cut.
BLOCKS = {"block_size": 64, "quant_block_size": 16, "density": 0.1, "window": 4, "lr": 1e-2}
WIDE = {**BLOCKS, "window": 9, "density": 1.0, "quant_bits": 32}
DEFAULT = Settings(
    tracking=True,
    bias_correction=True,
    momentum="gradient",
    nesterov=True,
    clip=math.inf,
    floor=0.1,
)
#: The steps that Adapprox has, the default's one pass and, clipped, two, the same over ranks, and
#: Algorithm 3 literally; MicroAdam.
METHODS: dict[str, tuple[dict[str, Any], Settings | MicroSettings]] = {
    "default": (RANKS, DEFAULT),
    "clipped": (
        {**RANKS, "clip_threshold": 0.5, "floor": 0.0},
        Settings(tracking=True, bias_correction=True, momentum="gradient", nesterov=True, clip=0.5),
    ),
    "matrix": ({**RANKS, "scope": "matrix"}, DEFAULT),
    "matrix_clipped": (
        {
            **RANKS,
            "scope": "matrix",
            "right_factor": "replicated",
            "clip_threshold": 0.5,
            "floor": 0.0,
            "momentum": "update",
        },
        Settings(tracking=True, bias_correction=True, nesterov=True, clip=0.5),
    ),
    "replicated": ({**RANKS, "scope": "matrix", "right_factor": "replicated"}, DEFAULT),
    "paper": ({**RANKS, "preset": "paper", "power_iterations": 2}, Settings()),
    "micro": (
        {**BLOCKS, "alpha": 0.125},
        MicroSettings(block=64, group=16, density=0.1, window=4, alpha=0.125),
    ),
    "micro_full": (
        {**BLOCKS, "quant_bits": 32},
        MicroSettings(block=64, group=16, density=0.1, window=4, bits=32),
    ),
}
#: What of an oracle is compared, by the state's key.
COMPARED = {None: "w", "exp_avg": "m", "exp_avg_sq": "v", "error": "e"}
