# SPDX-License-Identifier: Apache-2.0
"""What goes into and comes out of the two passes; shared by all backends.

Of an (m, n) block with S = [Q U^T]_+ the kept root of the second moment, both passes form::

    V = beta_2 max(S, floor)^2 + (1 - beta_2) G^2
    D = sqrt(V) * correction + eps        X = G / D

tile by tile. The first pass reduces; the second updates the first moment M and the weights W::

    mean of gradients    M <- beta_1 M + (1 - beta_1) G             N = M or ahead(M, G)
                         W <- (1 - lr decay) W - lr first_correction [N / D] / clip
    mean of updates      M <- beta_1 M + (1 - beta_1) X / clip      N = M or ahead(M, X / clip)
                         W <- (1 - lr decay) W - lr first_correction N
    no first moment      W <- (1 - lr decay) W - lr X / clip

where ahead(M, G) = beta_1 M + (1 - beta_1) G is Nesterov's, and [] holds to what gradients can make
of the quotient: where the factors have lost an entry, N / D would have no bound, unlike X, of which
V holds at least the square of G. To ascend is to do the same with -G. The sum of X^2, from which
the caller makes the clip, is one of the first pass's reductions. A pass takes a stack of B blocks
of one shape: weights, first moments and gradients as lists of B contiguous (m, n) tensors, which
may lie anywhere on the device; all else with a leading B. First moments may be kept in fewer bits:
a list of bf16 tensors, which are rounded at random, or of :class:`QuantizedMatrix`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapprox_ds.lowrank.quantized import QuantizedMatrix

#: A stack's first moments.
Means = Sequence[Tensor] | Sequence[QuantizedMatrix]


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The numbers of a step that are known on the host.

    Attributes:
        beta1: decay of the first moment; 0 where none is kept.
        beta2: decay of the second moment.
        correction: what sqrt(V) is multiplied by at use, 1 / sqrt(1 - beta_2^t) for bias
            correction, else 1.
        first_correction: what N is multiplied by at use, for bias correction; 1 without.
        eps: added to the corrected root.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        ascend: whether to go along the gradient instead of against it.
        of_gradients: whether the first moment is the mean of gradients, else of updates.
        nesterov: whether N looks ahead.
        clips: whether X is measured and updates are divided by the caller's clip.
        largest: the most that |N / D| can be where M is the mean of gradients.
        salt: of the random rounding of first moments in bf16 (lowrank/rounding.py).
    """

    beta1: float
    beta2: float
    correction: float
    first_correction: float
    eps: float
    lr: float
    weight_decay: float
    ascend: bool
    of_gradients: bool
    nesterov: bool
    clips: bool
    largest: float = math.inf
    salt: int = 0

    @property
    def sign(self) -> float:
        """What G counts as."""
        return -1.0 if self.ascend else 1.0

    @property
    def gain(self) -> float:
        """1 - beta_1, with the sign of G."""
        return self.sign * (1.0 - self.beta1)

    @property
    def ahead(self) -> tuple[float, float]:
        """Parts of M, and of G or X with the sign of G, that N consists of."""
        return (self.beta1, self.gain) if self.nesterov else (1.0, 0.0)

    def rate(self, has_first_moment: bool) -> float:
        """What is added to a weight for each part of N, or of G / D / clip where there is no M."""
        return -self.lr * (self.first_correction if has_first_moment else self.sign)


@dataclass(slots=True)
class FirstPass:
    """Reductions over V and X.

    Attributes:
        sketch: sqrt(V) times the sketch, (B, m, w).
        row_sums: of V, (B, m).
        col_sums: of V, (B, n).
        update_square: the sum of X^2, (B,); 0 where nothing is clipped.
    """

    sketch: Tensor
    row_sums: Tensor
    col_sums: Tensor
    update_square: Tensor


@dataclass(slots=True)
class SecondPass:
    """Reductions over V after the weights were updated.

    Attributes:
        projection: basis^T sqrt(V), (B, w, n).
        weighted_col_sums: row_weights^T V, (B, n).
    """

    projection: Tensor
    weighted_col_sums: Tensor
