# SPDX-License-Identifier: Apache-2.0
"""Rank control, on the host: reflection and the rank moment, or expansion from a small start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: "reflect": Algorithm 2 and line 7 of Algorithm 3. "expand": the paper's first version
#: (arXiv 2403.14958v1).
RANK_POLICIES = ("reflect", "expand")


@dataclass(frozen=True, slots=True)
class RankPolicy:
    """How the error ratios of a step set the rank of the next.

    Attributes:
        minimum: k_min, the smallest rank.
        maximum: k_max, the largest rank.
        step: delta k, how far one change moves.
        momentum: beta_3, the decay of the rank moment; with "reflect".
        threshold: xi_thresh, the error ratio above which the rank rises.
        kind: one of ``RANK_POLICIES``.
        start: k_0; where "expand" tries again from.
        interval: steps between such tries.
    """

    minimum: int
    maximum: int
    step: int
    momentum: float
    threshold: float
    kind: str = "reflect"
    start: int = 1
    interval: int = 10

    def clip(self, rank: float, bound: int) -> float:
        """A rank moment within the limits of a block that saves memory up to rank ``bound``."""
        high = min(self.maximum, bound)
        return min(max(rank, min(self.minimum, high)), high)

    def next_rank(self, rank: float, errors: Sequence[float], bound: int, t: int) -> float:
        """The rank moment that follows step ``t``.

        Args:
            rank: the rank moment k_{t-1}.
            errors: xi_t of equation 11, last; with "expand" before it those of the first 1, 2, ...
                columns alone.
            bound: the largest rank whose factors save memory for this block.
            t: the step, 1 at the first.
        """
        if self.kind == "expand":
            return self.expand(rank, errors, bound, t)
        return self.reflect(rank, errors[-1], bound)

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

    def expand(self, rank: float, errors: Sequence[float], bound: int, t: int) -> float:
        """The next rank: delta k more while xi is not met.

        Every ``interval`` steps k_0, k_0 + delta k, ... are tried again. That needs no
        factorisation and loses nothing: the ratios of a factorisation's first columns are known,
        and the rank only falls to one that meets xi.

        Args:
            rank: the rank k_{t-1}.
            errors: xi_t for the first 1, 2, ... columns.
            bound: the largest rank whose factors save memory for this block.
            t: the step, 1 at the first.
        """
        if t % self.interval == 0:
            for k in range(int(self.clip(self.start, bound)), len(errors), self.step):
                if errors[k - 1] <= self.threshold:
                    return float(k)
        return self.clip(rank + self.step, bound) if errors[-1] > self.threshold else rank


def rank_in_use(rank: float) -> int:
    """The integer rank that a real-valued rank moment stands for."""
    return max(1, int(rank + 0.5))
