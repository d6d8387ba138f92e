# SPDX-License-Identifier: Apache-2.0
"""Rank control: Algorithm 2's reflection and the rank moment of Algorithm 3, on the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPolicy:
    """How the error ratio of this step sets the rank of the next.

    Attributes:
        minimum: k_min, the smallest rank.
        maximum: k_max, the largest rank.
        step: delta k, how far one reflection moves.
        momentum: beta_3, the decay of the rank moment.
        threshold: xi_thresh, the error ratio above which the rank rises.
    """

    minimum: int
    maximum: int
    step: int
    momentum: float
    threshold: float

    def _limits(self, bound: int) -> tuple[int, int]:
        """k_min and k_max for a block whose factors save memory up to rank ``bound``."""
        high = min(self.maximum, bound)
        return min(self.minimum, high), high

    def clip(self, rank: float, bound: int) -> float:
        """A rank moment held within the limits of a block."""
        low, high = self._limits(bound)
        return min(max(rank, low), high)

    def reflect(self, rank: float, error: float, bound: int) -> float:
        """The next rank moment (Algorithm 2, then line 7 of Algorithm 3).

        Args:
            rank: the rank moment k_{t-1}, real-valued.
            error: the error ratio xi_t of equation 11.
            bound: the largest rank whose factors save memory for this block.

        Returns:
            k_t = beta_3 k_{t-1} + (1 - beta_3) k', k' = clip(k_{t-1} +- delta k).
        """
        moved = rank + self.step if error > self.threshold else rank - self.step
        target = self.clip(moved, bound)
        return self.momentum * rank + (1.0 - self.momentum) * target


def rank_in_use(rank: float) -> int:
    """The integer rank that a real-valued rank moment stands for."""
    return max(1, int(rank + 0.5))


def max_saving_rank(rows: int, cols: int) -> int:
    """The largest k with k * (rows + cols) < rows * cols; 0 where no rank saves memory."""
    return (rows * cols - 1) // (rows + cols)
