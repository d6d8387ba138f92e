# SPDX-License-Identifier: Apache-2.0
"""The first moment between Adam, which averages gradients, and Adapprox, which averages updates.

Adam's weights move by (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps), with m the mean of
the gradients; Adapprox's by M, the mean of the normalised updates G / (sqrt(V) + eps). So
M = m / (sqrt(v_hat) + eps) and m = M (sqrt(v_hat) + eps), v_hat = v / (1 - beta_2^t): the bias
correction of v belongs to the normalisation. That of m is left to the optimizer: m and M start
from zero alike, and after some tens of steps it is 1. The second moment is the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Keys of a parameter group that Adam and Adapprox read alike.
SHARED_KEYS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "maximize")

#: A key that every parameter group of Adapprox has, and of no other optimizer.
_OURS = "rank_max"


@dataclass(frozen=True, slots=True)
class Adam:
    """What the conversion of a first moment needs to know.

    Attributes:
        beta2: decay of the second moment.
        eps: added to its root.
        step: steps done, at least 1.
    """

    beta2: float
    eps: float
    step: int

    @classmethod
    def of_group(cls, group: Mapping[str, Any], step: int) -> Adam:
        """From a parameter group of either optimizer."""
        return cls(float(group["betas"][1]), float(group["eps"]), max(step, 1))

    def scale(self, second: Tensor) -> Tensor:
        """sqrt(v_hat) + eps; a new tensor."""
        corrected = second / (1.0 - self.beta2**self.step)
        return corrected.sqrt_().add_(self.eps)

    def to_updates(self, first: Tensor, second: Tensor) -> Tensor:
        """Adapprox's first moment from Adam's two; a new tensor."""
        return first / self.scale(second)

    def to_gradients(self, first: Tensor, second: Tensor) -> Tensor:
        """Adam's first moment from Adapprox's and a dense second one; a new tensor."""
        return first * self.scale(second)


def is_adapprox(groups: list[dict[str, Any]]) -> bool:
    """Whether Adapprox saved these parameter groups, rather than an Adam."""
    return any(_OURS in group for group in groups)


def shared_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a parameter group an optimizer of the other kind can take over."""
    return {key: group[key] for key in SHARED_KEYS if key in group}
