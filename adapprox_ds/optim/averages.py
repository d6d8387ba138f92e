# SPDX-License-Identifier: Apache-2.0
"""What the moving averages of gradients and of their squares are made with, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

#: Of a mean of gradients, older terms than these weigh nothing in any bound.
_TERMS = 2000


@dataclass(frozen=True, slots=True)
class Weights:
    """The numbers of one step.

    Attributes:
        kept: what V_{t-1} is multiplied by.
        added: what G_t^2 is multiplied by.
        correction: what sqrt(V_t) is multiplied by at use.
        first_correction: what M_t is multiplied by at use.
        largest: the most that |M| / (correction sqrt(V)) can be where M is a mean of gradients.
    """

    kept: float
    added: float
    correction: float
    first_correction: float
    largest: float


@lru_cache(maxsize=64)
def weights(betas: tuple[float, float], exponent: float, bias_correction: bool, t: int) -> Weights:
    """The weights of step ``t`` (1 at the first).

    Adam's corrected average of squares gives a step's own square (1 - beta_2) / (1 - beta_2^t) of
    the weight: 1, 1/2, 1/3, ... at first. Here it is at least t^-c: with c < 1 the average follows
    gradients that change early on, as Adafactor's does (Shazeer and Stern, 2018, section 7.2, with
    c = 0.8), and is Adam's again from the step at which t^-c has fallen to 1 - beta_2. V is kept
    as Adam keeps it, before correction, so that a checkpoint means the same to both.

    Args:
        betas: beta_1 and beta_2.
        exponent: c, in (0, 1]; 1 for Adam's average.
        bias_correction: of both moments; without it V is not scaled and ``exponent`` is 1.
        t: the step.
    """
    beta1, beta2 = betas
    if not bias_correction:
        return Weights(beta2, 1.0 - beta2, 1.0, 1.0, _largest(betas, exponent, False, t))
    share = _share(beta2, exponent, t)
    now, before = 1.0 - beta2**t, 1.0 - beta2 ** (t - 1)
    return Weights(
        kept=(1.0 - share) * now / before if before else 0.0,
        added=share * now,
        correction=now**-0.5,
        first_correction=1.0 / (1.0 - beta1**t),
        largest=_largest(betas, exponent, True, t),
    )


def _share(beta2: float, exponent: float, t: int) -> float:
    """The weight of step t's square in the corrected average of step t."""
    return max((1.0 - beta2) / (1.0 - beta2**t), t**-exponent if exponent < 1.0 else 0.0)


def _largest(betas: tuple[float, float], exponent: float, bias_correction: bool, t: int) -> float:
    """By Cauchy and Schwarz, of all sequences of gradients: sqrt of the sum of a_i^2 / b_i.

    a_i are the weights of the mean of gradients, b_i those of the average of squares.
    """
    beta1, beta2 = betas
    if beta1**2 >= beta2:  # grows without end
        return math.inf
    total, a, b = 0.0, 1.0 - beta1, 1.0
    for i in range(t, max(t - _TERMS, 0), -1):
        share = _share(beta2, exponent, i) if bias_correction else 1.0 - beta2
        total += a * a / (b * share)
        a, b = a * beta1, b * (1.0 - share)
        if not b or a * a < 1e-16 * b:
            break
    return math.sqrt(total)
