# SPDX-License-Identifier: Apache-2.0
"""What a setting may be, checked and said alike by every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: (what is allowed, whether a value is).
Rule = tuple[str, Callable[[Any], bool]]


def is_int(value: Any) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_betas(value: Any) -> bool:
    return len(value) == 2 and all(is_number(b) and 0.0 <= b < 1.0 for b in value)


RATE: Rule = (
    "a finite number >= 0, or a one-element tensor",
    lambda v: v.numel() == 1 if isinstance(v, Tensor) else is_number(v) and 0.0 <= v < math.inf,
)
BETAS: Rule = ("two numbers in [0, 1)", _is_betas)
NON_NEGATIVE: Rule = (
    "a finite number >= 0",
    lambda v: is_number(v) and 0.0 <= v < math.inf,
)
FLAG: Rule = ("true or false", lambda v: isinstance(v, bool))
#: How weights in bf16 or fp16 are written.
WEIGHT_ROUNDINGS = ("stochastic", "compensated", "nearest")
#: What a step does about gradients that are not finite.
NONFINITE = ("raise", "skip", "propagate")
NONFINITE_RULE: Rule = (
    f"one of {NONFINITE}, or None for what the DeepSpeed config asks for",
    lambda v: v is None or v in NONFINITE,
)


def require(owner: str, settings: Any, rules: Mapping[str, Rule]) -> None:
    """Make numbers of numpy Python's, and raise for the first setting that breaks its rule.

    Args:
        owner: the optimizer's name.
        settings: a dataclass with an attribute a rule; frozen or not.
        rules: by name of the setting.

    Raises:
        ValueError: names the setting, its value and what is allowed.
    """
    for name, (allowed, check) in rules.items():
        value = getattr(settings, name)
        plain = _plain(value)
        if not _holds(check, plain):
            raise ValueError(f"{owner}: {name}={value!r} is not allowed; allowed: {allowed}")
        if plain is not value:
            object.__setattr__(settings, name, plain)


def _plain(value: Any) -> Any:
    """Numbers in Python's own types: schedulers give numpy's, and checkpoints hold them."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Tensor) else value


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(check(value))
    except (TypeError, ValueError, RuntimeError):
        return False
