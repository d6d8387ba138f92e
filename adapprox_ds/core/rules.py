# SPDX-License-Identifier: Apache-2.0
"""What a setting is, declared once, and what follows from that for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

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
FRACTION: Rule = ("a number in [0, 1)", lambda v: is_number(v) and 0.0 <= v < 1.0)
FLAG: Rule = ("true or false", lambda v: isinstance(v, bool))


def at_least(least: int) -> Rule:
    """The rule of an integer that has a lower bound."""
    return f"an integer >= {least}", lambda v: is_int(v) and v >= least


def one_of(values: tuple[Any, ...]) -> Rule:
    """The rule of a choice."""
    return f"one of {values}", lambda v: v in values


def or_none(rule: Rule, meaning: str) -> Rule:
    """The rule of a setting that may also be None, with what None means."""
    allowed, check = rule
    return f"{allowed}, or None for {meaning}", lambda v: v is None or check(v)


#: How weights in bf16 or fp16 are written.
WEIGHT_ROUNDINGS = one_of(("stochastic", "compensated", "nearest"))
#: What a step does about gradients that are not finite.
NONFINITE = or_none(one_of(("raise", "skip", "propagate")), "what the DeepSpeed config asks for")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a setting; the docstring of the optimizer says what it does.

    Attributes:
        default: its value where it is not given; None where ``derived`` makes it.
        allowed: what it may be, in words.
        holds: whether a value is that.
        source: where the default comes from.
        derived: makes the default from the other settings.
    """

    default: Any
    allowed: str
    holds: Callable[[Any], bool]
    source: str
    derived: Callable[[Any], Any] | None


def setting(
    default: Any, rule: Rule, source: str, derived: Callable[[Any], Any] | None = None
) -> Any:
    """The field of a dataclass that declares a setting; see :class:`Setting`."""
    known = Setting(default, *rule, source, derived)
    return field(default=default, metadata={"setting": known})


H = TypeVar("H", bound="GroupSettings")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """The validated settings of one parameter group, beginning with those of AdamW.

    A subclass adds settings by :func:`setting`. A field that is declared otherwise is the
    optimizer's own: a group may hold it, and nobody gives it.

    Attributes:
        owner: the optimizer's name.
    """

    owner: ClassVar[str]

    lr: float | Tensor = setting(1e-3, RATE, "AdamW")  # noqa: RUF009 (it makes a field)
    betas: tuple[float, float] = setting((0.9, 0.999), BETAS, "AdamW")
    eps: float = setting(1e-8, NON_NEGATIVE, "AdamW")
    weight_decay: float = setting(1e-2, NON_NEGATIVE, "AdamW")

    def __post_init__(self) -> None:
        for name, known in self.declared().items():
            value = getattr(self, name)
            plain = _plain(value)
            if not _holds(known.holds, plain):
                raise self._refusal(name, known.allowed)
            if plain is not value:
                object.__setattr__(self, name, plain)
        # In order: what follows from another setting is declared after it.
        for name, known in self.declared().items():
            if known.derived and getattr(self, name) is None:
                object.__setattr__(self, name, known.derived(self))
        for name, allowed, holds in self._joint_rules():
            if not holds:
                raise self._refusal(name, allowed)

    def _joint_rules(self) -> tuple[tuple[str, str, bool], ...]:
        """(name, what is allowed, whether it holds) of the values that depend on others."""
        return ()

    def _refusal(self, name: str, allowed: str) -> ValueError:
        value = getattr(self, name)
        return ValueError(f"{self.owner}: {name}={value!r} is not allowed; allowed: {allowed}")

    def derived(self) -> dict[str, Any]:
        """What follows from other settings where it is not given."""
        known = self.declared().items()
        return {name: one.derived(self) for name, one in known if one.derived}

    @property
    def learning_rate(self) -> float:
        """``lr`` as a number; a tensor on a device is waited for."""
        return float(self.lr)

    @classmethod
    @cache
    def declared(cls) -> Mapping[str, Setting]:
        """What is known of each setting, by name."""
        return {f.name: f.metadata["setting"] for f in fields(cls) if f.metadata}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(cls.declared())

    @classmethod
    def of_group(cls: type[H], group: Mapping[str, Any]) -> H:
        """The settings held in a parameter group, validated: schedulers may have changed them."""
        own: dict[str, Any] = {f.name: group.get(f.name) for f in fields(cls) if not f.metadata}
        return cls(**own, **{name: group[name] for name in cls.names()})

    def as_group(self) -> dict[str, Any]:
        """The settings as a parameter group holds them: one key a setting."""
        return {name: getattr(self, name) for name in self.names()}

    def as_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as ``torch.optim.Optimizer`` defaults: one key a setting.

        None for what was derived, and not given: each group derives it from its own settings.
        """
        derived = {n: v for n, v in self.derived().items() if given.get(n) is None}
        own = self.as_group()
        return own | {n: None for n, v in derived.items() if own[n] == v}


def _plain(value: Any) -> Any:
    """Numbers in Python's own types: schedulers give numpy's, and checkpoints hold them."""
    if hasattr(value, "tolist") and not isinstance(value, Tensor):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(check(value))
    except (TypeError, ValueError, RuntimeError):
        return False
