# SPDX-License-Identifier: Apache-2.0
"""The first moment between its two kinds: the mean of gradients and the mean of updates.

Let m be the mean of the gradients, v that of their squares, c_1 and c_2 their bias corrections
1 / (1 - beta^t), or 1 without, and D = sqrt(c_2 v) + eps. The weights move by

    c_1 m / D    with a mean of gradients: Adam, and Adapprox with momentum="gradient";
    c_1 M        with a mean of updates: Adapprox with momentum="update".

So M = m / D and m = M D, and the weights go on as they went. D is that of the group whose mean is
of gradients: there it is applied at use. c_1 takes no part: m and M start from zero alike, and
either is corrected at use. The second moment is the same in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapprox_ds.adapprox.hyperparameters import LEAST_EPS, MOMENTA

#: The kinds of a first moment, by what it is the mean of.
GRADIENT, UPDATE = MOMENTA

#: Keys of a parameter group that Adam and Adapprox read alike.
SHARED_KEYS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "maximize")

#: A key that every parameter group of Adapprox has, and of no other optimizer.
_OURS = "rank_max"


def is_adapprox(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is Adapprox's, rather than an Adam's."""
    return _OURS in group


def is_adam(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is one of an Adam that keeps dense moments."""
    return not is_adapprox(group) and "quant_block_size" not in group


def kind_of(group: Mapping[str, Any]) -> str:
    """What the first moment of a parameter group is the mean of: "gradient" or "update"."""
    return str(group["momentum"]) if is_adapprox(group) else GRADIENT


def shared_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group an optimizer of the other kind can take over."""
    return {key: group[key] for key in SHARED_KEYS if key in group}


@dataclass(frozen=True, slots=True)
class Normalisation:
    """D, what a group divides its mean of gradients by at use, at a given step.

    Attributes:
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        bias_correction: whether the second moment is corrected.
        step: steps done, at least 1.
    """

    betas: tuple[float, float]
    eps: float
    bias_correction: bool
    step: int

    @classmethod
    def of_group(cls, group: Mapping[str, Any], step: int) -> Normalisation:
        """From a parameter group of Adapprox or of an Adam, some of which can go uncorrected."""
        beta1, beta2 = group["betas"]
        corrects = bool(group.get("bias_correction", True))
        eps = max(float(group["eps"]), LEAST_EPS)
        return cls((float(beta1), float(beta2)), eps, corrects, max(step, 1))

    def to_updates(self, mean: Tensor, second: Tensor) -> Tensor:
        """M = m / D; a new tensor.

        Where factors left next to nothing of v, M is held to the most that gradients can give.
        """
        largest = self._largest
        return (mean / self._denominator(second)).clamp_(-largest, largest)

    def to_gradients(self, mean: Tensor, second: Tensor) -> Tensor:
        """m = M D; a new tensor."""
        return mean * self._denominator(second)

    def _denominator(self, second: Tensor) -> Tensor:
        return (second / self._uncorrected).sqrt_().add_(self.eps)

    @property
    def _uncorrected(self) -> float:
        """1 / c_2."""
        return 1.0 - self.betas[1] ** self.step if self.bias_correction else 1.0

    @property
    def _largest(self) -> float:
        """What |m| / sqrt(c_2 v) is at most, whatever the gradients were (Cauchy and Schwarz)."""
        beta1, beta2 = self.betas
        if beta1**2 >= beta2:
            return math.inf
        square = (1.0 - beta1) ** 2 / ((1.0 - beta2) * (1.0 - beta1**2 / beta2))
        return math.sqrt(square * self._uncorrected)
