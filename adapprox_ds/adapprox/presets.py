# SPDX-License-Identifier: Apache-2.0
"""Adapprox's presets, and what the constructor makes of them and of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapprox_ds.adapprox.hyperparameters import Hyperparameters

#: Named settings; an argument given explicitly wins over the preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "lr": 3e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "rank_policy": "reflect",
        "rank_init": 256,
        "rank_min": 1,
        "rank_max": 256,
        "rank_step": 6,
        "rank_beta": 0.9,
        "error_threshold": 1e-3,
        "factor": "variance",
        "factor_dtype": "fp32",
        "warm_start": False,
        "balanced": False,
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
    },
}

#: Equal to no setting.
_NOT = object()


def resolve(preset: str | None, given: Mapping[str, Any]) -> Hyperparameters:
    """Defaults, then the preset, then what was given explicitly (not None).

    A preset's ``rank_init`` and ``rank_step`` hold only for its ``rank_max``, and ``rank_init``
    only for its ``rank_policy``.

    Raises:
        ValueError: unknown preset, or a value outside its range.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f"Adapprox: preset={preset!r} is not allowed; allowed: {sorted(PRESETS)} or None"
            )
        settings.update(PRESETS[preset])
    explicit = {name: value for name, value in given.items() if value is not None}
    if "rank_max" in explicit:
        settings.pop("rank_init", None)
        settings.pop("rank_step", None)
    if "rank_policy" in explicit:
        settings.pop("rank_init", None)
    return Hyperparameters(**{**settings, **explicit})


def as_defaults(settings: Hyperparameters, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as ``torch.optim.Optimizer`` defaults: one key a knob.

    None for what was derived, and not given: each group derives it from its own settings.
    """
    derived = settings.derived()
    return {
        name: None if given.get(name) is None and derived.get(name, _NOT) == value else value
        for name, value in settings.as_group().items()
    }
