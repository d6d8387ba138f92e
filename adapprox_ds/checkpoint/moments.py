# SPDX-License-Identifier: Apache-2.0
"""Converts a first moment between its two kinds: a mean of gradients, and a mean of updates.

Let m be the mean of the gradients, v that of their squares, c_1 and c_2 their bias corrections
1 / (1 - beta^t), or 1 without bias correction, and D = sqrt(c_2 v) + eps. The weights move by

    c_1 m / D    with a mean of gradients: Adam, and Adapprox with momentum="gradient";
    c_1 M        with a mean of updates M: Adapprox with momentum="update".

So with M = m / D or m = M D the next step moves the weights as it would have without the
conversion. D is computed with the settings of the group whose mean is of gradients, since only that
group divides its mean by D when it uses it. c_1 cancels, as both means start from zero and are
corrected when they are used. The second moment is the same for both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapprox_ds.adapprox.hyperparameters import LEAST_EPS, MOMENTA

#: The kinds of a first moment, named by what it is the mean of.
GRADIENT, UPDATE = MOMENTA

#: The keys of a parameter group that mean the same for Adam and for Adapprox.
SHARED_KEYS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "maximize")

#: A key that every parameter group of Adapprox has, and no other optimizer's group.
_OURS = "rank_max"


def is_adapprox(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is Adapprox's."""
    return _OURS in group


def is_adam(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is that of an Adam with dense moments."""
    return not is_adapprox(group) and "quant_block_size" not in group


def kind_of(group: Mapping[str, Any]) -> str:
    """What the first moment of a parameter group is the mean of: "gradient" or "update"."""
    return str(group["momentum"]) if is_adapprox(group) else GRADIENT


def shared_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that both Adam and Adapprox can use."""
    return {key: group[key] for key in SHARED_KEYS if key in group}


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Computes D, by which a group divides its mean of gradients when it uses it.

    Attributes:
        betas: the decay rates of the first and of the second moment.
        eps: the number that is added to the root of the second moment.
        bias_correction: whether the second moment is corrected for bias.
        step: the number of steps done, at least 1.
    """

    betas: tuple[float, float]
    eps: float
    bias_correction: bool
    step: int

    @classmethod
    def of_group(cls, group: Mapping[str, Any], step: int) -> Normalisation:
        """That of a parameter group of Adapprox or of an Adam, after ``step`` steps."""
        beta1, beta2 = group["betas"]
        # DeepSpeed's Adams can go without bias correction.
        corrects = bool(group.get("bias_correction", True))
        eps = max(float(group["eps"]), LEAST_EPS)
        return cls((float(beta1), float(beta2)), eps, corrects, max(step, 1))

    def to_updates(self, mean: Tensor, second: Tensor) -> Tensor:
        """M = m / D, as a new tensor.

        Args:
            mean: m, of any shape.
            second: v, of the same shape. Where a low-rank approximation made it far too small, M is
                clamped to the largest quotient that gradients could have given.
        """
        largest = self._largest
        return (mean / self._denominator(second)).clamp_(-largest, largest)

    def to_gradients(self, mean: Tensor, second: Tensor) -> Tensor:
        """m = M D, as a new tensor; ``mean`` is M and ``second`` v, of the same shape."""
        return mean * self._denominator(second)

    def _denominator(self, second: Tensor) -> Tensor:
        return (second / self._uncorrected).sqrt_().add_(self.eps)

    @property
    def _uncorrected(self) -> float:
        """1 / c_2."""
        return 1.0 - self.betas[1] ** self.step if self.bias_correction else 1.0

    @property
    def _largest(self) -> float:
        """The largest |m| / sqrt(c_2 v) that any gradients can give (Cauchy and Schwarz)."""
        beta1, beta2 = self.betas
        if beta1**2 >= beta2:
            return math.inf
        square = (1.0 - beta1) ** 2 / ((1.0 - beta2) * (1.0 - beta1**2 / beta2))
        return math.sqrt(square * self._uncorrected)
