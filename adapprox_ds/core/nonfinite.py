# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not finite: found before a step writes anything, and by all ranks at once.

A NaN or an infinity in one gradient spoils its weight, its moments and, through the factors, the
second moments of its whole matrix, for ever. Squares count too: beyond 1.8e19 they leave fp32.

Where DeepSpeed has measured the norm of all gradients, which it does before each step, that one
number tells, on all ranks alike and for all parameter groups. Elsewhere the norm of each fragment
is taken here, and ranks that share shards agree. On an accelerator the answer goes to the host
while the device prepares Adapprox's sketches; MicroAdam waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adapprox_ds.core.kernels.squares import largest_square
from adapprox_ds.core.layout import FragmentLayout
from adapprox_ds.core.state import compute_dtype

#: Parameters that a message names.
_MOST_NAMES = 5


class NonfiniteGradientError(RuntimeError):
    """A step's gradients hold NaN, infinity or what has no square in fp32; nothing was changed."""


class Checked(Protocol):
    """A fragment of a parameter with its gradient."""

    @property
    def layout(self) -> FragmentLayout:
        """Whose it is."""

    @property
    def g(self) -> Tensor:
        """The gradient, (numel,)."""


@dataclass(slots=True)
class GradientCheck:
    """Whether a step may write; on its way to the host.

    Attributes:
        bad: 0-dim, 0 or 1; on the host once ``ready`` has come.
        ready: the event that follows the copy.
        passed: whether the answer is known, and good.
    """

    bad: Tensor
    ready: Any = None
    passed: bool = False

    @classmethod
    def start(
        cls, fragments: Sequence[Checked], norm: Any, agree: Callable[[Tensor], Tensor] | None
    ) -> GradientCheck:
        """Begin; returns at once.

        Args:
            fragments: what the step is to update.
            norm: of all gradients of all ranks, where it is known: a number or a 0-dim tensor,
                negative for one that is not finite.
            agree: makes 1 of a 0 where any rank has a 1; None where all ranks have the same
                gradients.
        """
        if norm is not None:
            if not isinstance(norm, Tensor):
                norm = torch.tensor(float(norm), dtype=torch.float64, device="cpu")
            size = norm.detach().double() / _limit(torch.float32)
            bad = ((size >= 0) & (size <= 1)).logical_not().float()
        else:
            bad = (_largest(fragments) <= 1).logical_not().float()
            if agree is not None:
                bad = agree(bad)
        if bad.device.type == "cpu":
            return cls(bad)
        host = torch.empty(bad.shape, dtype=bad.dtype, device="cpu", pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.Event(bad.device.type)
        event.record()
        return cls(host, event)

    def require(self) -> None:
        """Return where the step may write.

        Raises:
            NonfiniteGradientError: it may not.
        """
        if self.passed:
            return
        if self.ready is not None:
            self.ready.synchronize()
        if self.bad.item():
            raise NonfiniteGradientError
        self.passed = True


def describe(owner: str, fragments: Sequence[Checked]) -> str:
    """What to tell the user of an optimizer: which parameters, as far as they lie here."""
    names = [f.layout.fragment.name for f in fragments if not bool(_largest([f]) <= 1)]
    names = list(dict.fromkeys(names))
    shown = ", ".join(map(repr, names[:_MOST_NAMES]))
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    where = f"of {shown}" if names else "on another rank or in another parameter group"
    return (
        f"{owner}: gradients {where} hold NaN, infinity or numbers whose squares leave fp32. The "
        "step was left out: weights and moments are those of before. Look at the loss and the "
        'data of this step; nonfinite="skip" goes on without such steps, "propagate" checks nothing'
    )


def _limit(dtype: torch.dtype) -> float:
    """The largest number whose square is finite."""
    return float(torch.finfo(compute_dtype(dtype)).max ** 0.5)


def _largest(fragments: Sequence[Checked]) -> Tensor:
    """The largest norm of a gradient, over what it may be; 0-dim, NaN where one is."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for f in fragments:
        alike[f.g.device, f.g.dtype].append(f.g)
    if not alike:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    found = [
        _norm(parts, compute_dtype(dtype)) / _limit(dtype) for (_, dtype), parts in alike.items()
    ]
    # To an accelerator, if there is one: a copy from one would have to be waited for here.
    device = max((size.device for size in found), key=lambda d: d.type != "cpu")
    return torch.stack([size.to(device, non_blocking=True) for size in found]).amax()


def _norm(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The largest norm of some tensors of one device, 0-dim fp64; NaN where one is."""
    square = largest_square(tensors)
    if square is not None:
        return torch.tensor(square, dtype=torch.float64, device="cpu").sqrt_()
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).amax().double()
