# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels beside torch on the user's own device, before they first touch a weight.

Where nobody asked for Triton, each form of a kernel (dtypes, state, rank) runs once on a small
example beside the torch backend. Where the results differ by more than :data:`BOUND`, or the kernel
cannot be compiled or launched, torch takes that form for the rest of the process, and one warning
says so.

An optimizer's own kernels package makes the examples. They are seeded random numbers in the forms
that the step at hand has. Its own numbers would prove less: in a first step the state is zero, and
during warm-up the learning rate, so that a kernel that left them out would pass.

Ranks that share shards agree on all verdicts in their first step (core/agreement.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

#: The device and what tells a kernel's forms apart.
Form = tuple[Any, ...]

_log = logging.getLogger(__name__)

#: The most that the difference of two results may be, as a part of the reference, both by their
#: Euclidean norms. Sums in another order differ by 1e-6 of them, and a wrong tile by far more.
BOUND = 1e-3
#: The same of what is rounded to few bits, where a neighbour may be met.
_ROUNDED_BOUND = 2e-2
#: Form -> why torch takes it, or None where Triton does. Of this process.
_verdicts: dict[Form, str | None] = {}
#: Whether forms that have no verdict yet go to torch instead of being checked.
_closed = False
#: In the failures of a rank, one of all its forms.
EVERY = "every form"


def verdicts() -> dict[str, str]:
    """What was found so far: a form in words -> "triton", or "torch: " and the reason."""
    return {
        " ".join(map(str, form)): "triton" if reason is None else f"torch: {reason}"
        for form, reason in _verdicts.items()
    }


def is_right(form: Form, compare: Callable[[], str | None]) -> bool:
    """Whether a form of a kernel may be used; compares once and remembers.

    Args:
        form: the device and what tells the kernel's forms apart.
        compare: runs both and says what differs, or None.
    """
    if form not in _verdicts:
        try:
            reason = "ranks agreed on kernels without it" if _closed else compare()
        # Whatever a compiler or driver raises: the step goes on without it.
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
        _verdicts[form] = reason
        if reason is not None:
            _warn(form, reason)
    return _verdicts[form] is None


def _warn(form: Form, reason: str) -> None:
    _log.warning(
        "a Triton kernel failed its self-check on this device, and plain torch, which is "
        "slower, takes its place: %s; %s. Please report this line with the versions of "
        "torch and Triton and the name of the device; ADAPPROX_KERNELS=torch says that "
        "torch is meant",
        " ".join(map(str, form)),
        reason,
    )


def failures() -> dict[str, str]:
    """Forms that torch takes, in words and without their device, and why: for other ranks."""
    failed = ((form, reason) for form, reason in _verdicts.items() if reason is not None)
    return {_anywhere(form): reason for form, reason in failed}


def give_up(failed: Mapping[str, str]) -> None:
    """Let torch take what failed on other ranks.

    Args:
        failed: as of :func:`failures`; with :data:`EVERY` all forms.
    """
    for form, reason in _verdicts.items():
        found = failed.get(_anywhere(form), failed.get(EVERY))
        if reason is None and found is not None:
            _verdicts[form] = found
            _warn(form, found)


def _anywhere(form: Form) -> str:
    return " ".join(map(str, form[1:]))


@contextmanager
def closed(agreed: bool) -> Iterator[None]:
    """While ranks work together, no more forms are checked: others might take another backend.

    Args:
        agreed: whether they have agreed on some.
    """
    global _closed
    before, _closed = _closed, agreed
    try:
        yield
    finally:
        _closed = before


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """The first result that is off by more than the bound, in words, or None."""
    for name, want in wanted.items():
        got = found[name].double()
        bound = _ROUNDED_BOUND if want.element_size() < 4 else BOUND
        off = float((got - want.double()).norm())
        size = float(want.double().norm())
        # In this form NaN is too much.
        if not off <= bound * size:
            return f"{name} differ from torch's by {off:.3g} (allowed {bound:g} of {size:.3g})"
    return None
