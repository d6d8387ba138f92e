# SPDX-License-Identifier: Apache-2.0
"""Adapprox's presets, and the settings that follow from them and from what is given beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapprox_ds.adapprox.hyperparameters import Hyperparameters

#: Named settings: what is other than the defaults, or is not to follow from what is given beside
#: them. An argument given explicitly wins.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "lr": 3e-4,
        "weight_decay": 0.1,
        "rank_max": 256,
        "warm_start": False,
        "oversampling": 5,
    },
}


def resolve(preset: str | None, given: Mapping[str, Any]) -> Hyperparameters:
    """Defaults, then the preset, then what was given explicitly (not None).

    Raises:
        ValueError: unknown preset, or a value outside its range.
    """
    if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
        raise ValueError(
            f"Adapprox: preset={preset!r} is not allowed; allowed: {sorted(PRESETS)} or None"
        )
    settings = {} if preset is None else PRESETS[preset]
    explicit = {name: value for name, value in given.items() if value is not None}
    return Hyperparameters(**{**settings, **explicit})
