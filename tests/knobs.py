# SPDX-License-Identifier: Apache-2.0
"""Values that each hyper-parameter refuses and takes, and the paper's."""

from __future__ import annotations

import math
from typing import Any

import torch

from adapprox_ds import Adapprox, MicroAdam

NAN, INF = math.nan, math.inf
NOT_A_NUMBER: list[Any] = [NAN, "1e-3", True, [1.0], {}]

BAD: dict[str, list[Any]] = {
    "lr": [-1e-3, INF, torch.zeros(2), torch.zeros(0), *NOT_A_NUMBER],
    "betas": [
        (1.0, 0.999),
        (0.9, 1.0),
        (-0.1, 0.999),
        (0.9, NAN),
        (0.9,),
        (0.9, 0.99, 0.999),
        0.9,
        "betas",
        (None, 0.999),
        ("0.9", "0.999"),
    ],
    "eps": [-1e-8, INF, *NOT_A_NUMBER],
    "weight_decay": [-0.1, INF, *NOT_A_NUMBER],
    "rank_policy": ["Expand", "", 1, True, ["reflect"], "expand"],
    "rank_interval": [0, -1, 10.0, "10", True],
    "rank_init": [0, -1, 8.0, "8", True, 10_000],
    "rank_min": [0, 1.0, "1", True, 10_000],
    "rank_max": [0, -5, 64.0, "64", True, NAN],
    "rank_step": [0, 1.5, "2", True],
    "rank_beta": [-0.1, 1.0, NAN, "0.9", False],
    "error_threshold": [0.0, -1e-3, NAN, "1e-3", True],
    "factor_dtype": ["float32", "BF16", "fp16", 16, True],
    "warm_start": [1, 0, "true"],
    "floor": [-0.1, 1.5, NAN, "0.3", True],
    "momentum": ["gradients", "Update", "", 1, True],
    "nesterov": [1, 0, "true"],
    "first_moment": ["float32", "INT8", "", 8, "none"],
    "weight_rounding": ["Stochastic", "", True, 1, "random"],
    "guidance": ["Cosine", "", True, 1],
    "bias_correction": [1, 0, "true"],
    "power_iterations": [0, 1.0, "1", True, 2],
    "oversampling": [-1, 5.0, "5", True],
    "scope": ["matrices", "", 1, True],
    "right_factor": ["whole", "", 2, True, "sharded"],
    "clip_threshold": [0.0, -1.0, NAN, "1", True],
    "seed": [-1, 0.5, "0", True],
    "maximize": [1, 0, "true"],
    "nonfinite": ["Raise", "", True, 1],
}
MICRO_BAD: dict[str, list[Any]] = {
    **{name: BAD[name] for name in ("lr", "betas", "weight_decay", "maximize")},
    "eps": [0.0, *BAD["eps"]],
    "window": [0, -1, 10.0, "10", True],
    "density": [0.0, -0.1, 1.5, NAN, "0.01", True],
    "block_size": [0, 1, 100, 4096.0, "4096", True, 2**15 + 128],
    "quant_bits": [0, 8, 16, 4.0, "4", True],
    "quant_block_size": [0, 1, 3, 128.0, "128", True, 2**15 + 2, 96],
    "alpha": [-0.1, 1.0, 1, -2, INF, *NOT_A_NUMBER],
    "weight_rounding": BAD["weight_rounding"],
    "nonfinite": BAD["nonfinite"],
}
CASES = [
    (cls, name, value)
    for cls, bad in ((Adapprox, BAD), (MicroAdam, MICRO_BAD))
    for name, values in bad.items()
    for value in values
]

GOOD: dict[str, list[Any]] = {
    "lr": [0, 0.0, 1, torch.tensor(1e-3), torch.tensor([1e-3])],
    "betas": [(0.0, 0.0), [0.9, 0.999], (0, 0.5)],
    "eps": [0, 0.0, 1e-30],
    "weight_decay": [0, 0.0, 2.0],
    "rank_policy": ["reflect"],
    "rank_interval": [1, 1000],
    "rank_init": [1, 4, None],
    "rank_min": [1, 4],
    "rank_max": [1, 10_000],
    "rank_step": [1, 1000, None],
    "rank_beta": [0.0, 0.999],
    "error_threshold": [1e-12, 2],
    "factor_dtype": ["fp32", "bf16"],
    "warm_start": [True, False],
    "floor": [0, 0.0, 1.0],
    "momentum": ["gradient", "update", None],
    "nesterov": [True, False, None],
    "first_moment": ["fp32", "bf16", "int8", "int4"],
    "weight_rounding": ["stochastic", "compensated", "nearest"],
    "guidance": ["none", "cosine"],
    "bias_correction": [True, False, None],
    "power_iterations": [1, None],
    "oversampling": [0, 100],
    "scope": ["partition", "matrix"],
    "right_factor": ["replicated", None],
    "clip_threshold": [1e-6, INF],
    "seed": [0, 2**70],
    "maximize": [True, False],
    "nonfinite": ["raise", "skip", "propagate"],
}

MICRO_GOOD: dict[str, list[Any]] = {
    **{name: GOOD[name] for name in ("lr", "betas", "weight_decay", "maximize")},
    "eps": [1e-30, 1],
    "window": [1, 1000],
    "density": [1e-9, 1, 1.0],
    "block_size": [128, 2**15],
    "quant_bits": [4, 32],
    "quant_block_size": [2, 4096],
    "alpha": [0, 0.0, 1e-9, 0.999],
    "weight_rounding": GOOD["weight_rounding"],
    "nonfinite": GOOD["nonfinite"],
}

#: Section 4 of the paper and its Algorithm 3, as printed.
PAPER: dict[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "rank_policy": "reflect",
    "rank_init": 256,
    "rank_min": 1,
    "rank_max": 256,
    "rank_step": 6,  # ceil(0.02 * 256)
    "rank_beta": 0.9,
    "error_threshold": 1e-3,
    "factor_dtype": "fp32",
    "warm_start": False,
    "floor": 0.0,
    "momentum": "update",
    "nesterov": False,
    "first_moment": "fp32",
    "guidance": "none",
    "bias_correction": False,
    "power_iterations": 5,
    "oversampling": 5,
    "scope": "partition",
    "right_factor": "replicated",
    "clip_threshold": 1.0,
    "nonfinite": None,
}
