# SPDX-License-Identifier: Apache-2.0
"""The dtypes that a step computes in and keeps state in."""

from __future__ import annotations

import torch

from adapprox_ds.optim.hyperparameters import Hyperparameters


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a step computes in: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def factor_dtype(dtype: torch.dtype, h: Hyperparameters) -> torch.dtype:
    """The dtype a parameter's factors are kept in."""
    return torch.bfloat16 if h.factor_dtype == "bf16" else compute_dtype(dtype)
