# SPDX-License-Identifier: Apache-2.0
"""What goes into and comes out of the two passes; shared by all backends.

Of an (m, n) block with S = [Q U^T]_+ the kept root of the second moment, both passes form::

    V = beta_2 max(S, floor)^2 + (1 - beta_2) G^2        X = G / (sqrt(V) * correction + eps)

tile by tile. The first reduces, the second updates weights and first moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The numbers of a step that are known on the host.

    Attributes:
        beta1: decay of the first moment; 0 where none is kept.
        beta2: decay of the second moment.
        correction: what sqrt(V) is multiplied by at use, 1 / sqrt(1 - beta_2^t) for bias
            correction, else 1.
        eps: added to the corrected root.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        ascend: whether to add the update instead of subtracting it.
    """

    beta1: float
    beta2: float
    correction: float
    eps: float
    lr: float
    weight_decay: float
    ascend: bool


@dataclass(slots=True)
class FirstPass:
    """Reductions over V and X.

    Attributes:
        sketch: sqrt(V) times the sketch, (m, w).
        row_sums: of V, (m,).
        col_sums: of V, (n,).
        update_square: the sum of X^2, 0-dim.
    """

    sketch: Tensor
    row_sums: Tensor
    col_sums: Tensor
    update_square: Tensor


@dataclass(slots=True)
class SecondPass:
    """Reductions over V after the weights were updated.

    Attributes:
        projection: basis^T sqrt(V), (w, n).
        weighted_col_sums: row_weights^T V, (n,).
    """

    projection: Tensor
    weighted_col_sums: Tensor
