# SPDX-License-Identifier: Apache-2.0
"""The check for gradients that are not finite, made before a step writes anything.

A NaN or an infinity in one gradient spoils its weight, its moments and, through the factors, the
second moments of its whole matrix, for ever. A finite gradient whose square overflows does the
same; in fp32 that is one above 1.8e19.

DeepSpeed measures the norm of all gradients before each step. Where this number is at hand, it is
all that the check needs, and it is the same on all processes and for all parameter groups.
Elsewhere the check computes the norm of each fragment's gradient, and the processes that share
shards agree on the answer. On an accelerator the answer is copied to the host while the device
prepares Adapprox's sketches; MicroAdam waits for it.
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

#: The most parameters that a message names.
_MOST_NAMES = 5


class NonfiniteGradientError(RuntimeError):
    """Gradients contain NaN, infinity or a number whose square overflows; nothing was changed."""


class Checked(Protocol):
    """What the check needs to know of a fragment of a parameter."""

    @property
    def layout(self) -> FragmentLayout:
        """The fragment's layout."""

    @property
    def g(self) -> Tensor:
        """The gradient, (numel,)."""


@dataclass(slots=True)
class GradientCheck:
    """The answer to whether a step may write, which may still be on its way to the host.

    Attributes:
        size: the norm of gradients, 0-dim, on the host, and valid only after ``ready``.
        limit: the step may write where ``size`` is at least 0 and at most this.
        ready: the event that follows the copy to the host; None where nothing had to be copied.
        passed: whether the answer was read and is that the step may write.
    """

    size: Tensor
    limit: float
    ready: Any = None
    passed: bool = False

    @classmethod
    def start(
        cls, fragments: Sequence[Checked], norm: Any, agree: Callable[[Tensor], Tensor] | None
    ) -> GradientCheck:
        """Begin the check, without waiting for an accelerator.

        Args:
            fragments: the fragments that the step is to update.
            norm: the norm of all gradients of all processes, a number or a 0-dim tensor; a negative
                one stands for a norm that is not finite. None where it is not known.
            agree: takes 1 where this process's gradients are bad, else 0, and returns the maximum
                over the processes; None where all processes have the same gradients. Not used where
                the norm is known.
        """
        limit = _limit(torch.float32)
        if norm is None:
            size, limit = _largest(fragments), 1.0
            if agree is not None:
                # A flag, since the maximum of several processes' numbers may pass over NaN.
                size, limit = agree((size <= 1).logical_not().float()), 0.5
        elif isinstance(norm, Tensor):
            size = norm.detach()
        else:
            size = torch.tensor(float(norm), dtype=torch.float64, device="cpu")
        if size.device.type == "cpu":
            return cls(size, limit)
        host = torch.empty(size.shape, dtype=size.dtype, device="cpu", pin_memory=True)
        host.copy_(size, non_blocking=True)
        event = torch.Event(size.device.type)
        event.record()
        return cls(host, limit, event)

    def require(self) -> None:
        """Wait for the answer, and return if the step may write.

        Raises:
            NonfiniteGradientError: it may not.
        """
        if self.passed:
            return
        if self.ready is not None:
            self.ready.synchronize()
        # In this form NaN is refused.
        if not 0 <= self.size.item() <= self.limit:
            raise NonfiniteGradientError
        self.passed = True


def describe(owner: str, fragments: Sequence[Checked]) -> str:
    """The error message for the user, which names parameters whose gradients are not finite.

    Args:
        owner: the optimizer's name.
        fragments: the fragments of this process; parameters on other processes are not named.
    """
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
    """The largest number whose square is finite in the dtype to compute in."""
    return float(torch.finfo(compute_dtype(dtype)).max ** 0.5)


def _largest(fragments: Sequence[Checked]) -> Tensor:
    """The largest norm of a fragment's gradient, as a multiple of :func:`_limit`.

    Returns:
        A 0-dim fp64 tensor; NaN where a gradient contains NaN.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for f in fragments:
        alike[f.g.device, f.g.dtype].append(f.g)
    if not alike:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    found = [
        _norm(parts, compute_dtype(dtype)) / _limit(dtype) for (_, dtype), parts in alike.items()
    ]
    if len(found) == 1:
        return found[0]
    # The norms go to an accelerator if there is one, since a copy from one has to be waited for.
    device = max((size.device for size in found), key=lambda d: d.type != "cpu")
    return torch.stack([size.to(device, non_blocking=True) for size in found]).amax()


def _norm(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The largest norm of some tensors of one device, 0-dim fp64; NaN where one contains NaN."""
    square = largest_square(tensors)
    if square is not None:
        return torch.tensor(square, dtype=torch.float64, device="cpu").sqrt_()
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).amax().double()
