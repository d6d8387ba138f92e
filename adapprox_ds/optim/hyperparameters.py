# SPDX-License-Identifier: Apache-2.0
"""Every knob of Adapprox: its range, its default, its source. Presets, and what is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.lowrank.rank import RankPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """The validated settings of one parameter group.

    Defaults are the values of the paper (sections 3 and 4) except for ``lr`` and
    ``weight_decay``, which are those of ``torch.optim.AdamW``.

    Attributes:
        lr: alpha, the learning rate; a float, or a one-element tensor read at every step.
        betas: (beta_1, beta_2), decay of the first and the second moment; beta_1 = 0 keeps no
            first moment.
        eps: epsilon, added to the root of the second moment.
        weight_decay: lambda, decoupled.
        rank_init: k_0; by default ``rank_max``.
        rank_min: k_min.
        rank_max: k_max. A matrix (m, n) is further held to k < m n / (m + n), below which factors
            are smaller than the dense matrix.
        rank_step: delta k; by default max(ceil(0.02 rank_max), 1) (section 3.3).
        rank_beta: beta_3, decay of the rank moment.
        error_threshold: xi_thresh, the error ratio above which a rank rises.
        power_iterations: l of Algorithm 1.
        oversampling: p of Algorithm 1.
        clip_threshold: d, the largest root mean square of an update; ``inf`` for no clipping.
        seed: of the random sketches, which leave the model's own random stream untouched.
        maximize: ascend instead of descend.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rank_init: int | None = None
    rank_min: int = 1
    rank_max: int = 256
    rank_step: int | None = None
    rank_beta: float = 0.9
    error_threshold: float = 1e-3
    power_iterations: int = 5
    oversampling: int = 5
    clip_threshold: float = 1.0
    seed: int = 0
    maximize: bool = False

    def __post_init__(self) -> None:
        for name, (allowed, check) in _RULES.items():
            value = getattr(self, name)
            if not _holds(check, value):
                raise ValueError(f"Adapprox: {name}={value!r} is not allowed; allowed: {allowed}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.rank_init is None:
            object.__setattr__(self, "rank_init", self.rank_max)
        if self.rank_step is None:
            object.__setattr__(self, "rank_step", max(math.ceil(0.02 * self.rank_max), 1))
        if not self.rank_min <= self.k0 <= self.rank_max:
            raise ValueError(
                f"Adapprox: rank_init={self.rank_init!r} is not allowed; allowed: rank_min <= "
                f"rank_init <= rank_max, here {self.rank_min} <= rank_init <= {self.rank_max}"
            )

    @property
    def k0(self) -> int:
        """The initial rank."""
        assert self.rank_init is not None
        return self.rank_init

    @property
    def learning_rate(self) -> float:
        """``lr`` as a number; a tensor on a device is waited for."""
        return float(self.lr)

    @property
    def rank_policy(self) -> RankPolicy:
        """The settings of Algorithm 2."""
        assert self.rank_step is not None
        return RankPolicy(
            minimum=self.rank_min,
            maximum=self.rank_max,
            step=self.rank_step,
            momentum=self.rank_beta,
            threshold=self.error_threshold,
        )

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """The settings held in a parameter group, validated: schedulers may have changed them."""
        return cls(**{name: group[name] for name in FIELD_NAMES})


FIELD_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Hyperparameters))

#: Named settings; an argument given explicitly wins over the preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "lr": 3e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "rank_init": 256,
        "rank_min": 1,
        "rank_max": 256,
        "rank_step": 6,
        "rank_beta": 0.9,
        "error_threshold": 1e-3,
        "power_iterations": 5,
        "oversampling": 5,
        "clip_threshold": 1.0,
    },
}

_Rule = tuple[str, Callable[[Any], bool]]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_betas(value: Any) -> bool:
    return len(value) == 2 and all(0.0 <= float(b) < 1.0 for b in value)


_NON_NEGATIVE: _Rule = (
    "a finite number >= 0",
    lambda v: not isinstance(v, bool) and 0.0 <= v < math.inf,
)

_RULES: Mapping[str, _Rule] = {
    "lr": (
        "a finite number >= 0, or a one-element tensor",
        lambda v: (
            v.numel() == 1
            if isinstance(v, Tensor)
            else not isinstance(v, bool) and 0.0 <= v < math.inf
        ),
    ),
    "betas": ("two numbers in [0, 1)", _is_betas),
    "eps": _NON_NEGATIVE,
    "weight_decay": _NON_NEGATIVE,
    "rank_min": ("an integer >= 1", lambda v: _is_int(v) and v >= 1),
    "rank_max": ("an integer >= 1", lambda v: _is_int(v) and v >= 1),
    "rank_init": ("an integer >= 1, or None for rank_max", lambda v: v is None or _is_int(v)),
    "rank_step": (
        "an integer >= 1, or None for ceil(0.02 rank_max)",
        lambda v: v is None or (_is_int(v) and v >= 1),
    ),
    "rank_beta": ("a number in [0, 1)", lambda v: 0.0 <= v < 1.0),
    "error_threshold": ("a number > 0", lambda v: v > 0.0),
    "power_iterations": ("an integer >= 1", lambda v: _is_int(v) and v >= 1),
    "oversampling": ("an integer >= 0", lambda v: _is_int(v) and v >= 0),
    "clip_threshold": ("a number > 0; inf for no clipping", lambda v: v > 0.0),
    "seed": ("an integer >= 0", lambda v: _is_int(v) and v >= 0),
    "maximize": ("true or false", lambda v: isinstance(v, bool)),
}

#: torch.optim and DeepSpeed arguments that are refused, with the remedy. False and None pass.
_REFUSED: Mapping[str, str] = {
    "fused": "the step has kernels of its own; leave it out",
    "foreach": "the step has kernels of its own; leave it out",
    "capturable": (
        "a step's ranks are decided on the host, so it cannot be captured in a CUDA graph; "
        "leave it out, and capture forward and backward alone"
    ),
    "differentiable": "factors are not differentiable; use torch.optim.AdamW(differentiable=True)",
    "amsgrad": "a running maximum has no low-rank form; use torch.optim.AdamW(amsgrad=True)",
    "max_grad_norm": 'set "gradient_clipping" in the DeepSpeed config instead',
    "rank": "use rank_init, rank_min and rank_max",
}


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(check(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Raise for arguments that Adapprox does not have.

    Raises:
        ValueError: an argument of torch.optim or DeepSpeed that cannot be honoured; names the
            remedy.
        TypeError: any other name; names the closest known one and all that are allowed.
    """
    for name, value in unknown.items():
        if name in _REFUSED:
            if value is None or value is False:
                continue
            raise ValueError(f"Adapprox: {name}={value!r} is not supported: {_REFUSED[name]}")
        allowed = (*FIELD_NAMES, "preset")
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise TypeError(
            f"Adapprox: unknown parameter {name}={value!r}; {hint}allowed: {', '.join(allowed)}"
        )


def resolve(preset: str | None, given: Mapping[str, Any]) -> Hyperparameters:
    """Defaults, then the preset, then what was given explicitly (not None).

    A ``rank_max`` given below the preset's ``rank_init`` lowers that with it, and a preset's
    ``rank_step`` holds only for the preset's ``rank_max``.

    Raises:
        ValueError: unknown preset, or a value outside its range.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(
                f"Adapprox: preset={preset!r} is not allowed; allowed: {sorted(PRESETS)} or None"
            )
        settings.update(PRESETS[preset])
    explicit = {name: value for name, value in given.items() if value is not None}
    if "rank_max" in explicit:
        settings.pop("rank_init", None)
        settings.pop("rank_step", None)
    return Hyperparameters(**{**settings, **explicit})


def as_group_defaults(settings: Hyperparameters) -> dict[str, Any]:
    """The settings as ``torch.optim.Optimizer`` defaults: one key a knob."""
    return {name: getattr(settings, name) for name in FIELD_NAMES}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a step computes and keeps factors in: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)
