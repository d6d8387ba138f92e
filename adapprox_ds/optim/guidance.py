# SPDX-License-Identifier: Apache-2.0
"""Guidance by the cosine between an update and the first moment.

The paper's first version (arXiv 2403.14958v1) offers it and its public summary gives no formula.
Ours divides by one minus the cosine, within bounds::

    gain = 1 / max(1 - cos(X, Y), 1/2)

X is the update that this step's gradient alone would make, and Y that of the first moment from
before the step. So the gain is 1/2 where they are opposite, 1 where they are orthogonal or nothing
is known, as at the first step, and 2 where they are parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gain(sums: Tensor) -> Tensor:
    """What updates are multiplied by, (F,).

    Args:
        sums: of X Y, X^2 and Y^2, (F, 3).
    """
    xy, xx, yy = sums.unbind(-1)
    norms = xx.sqrt() * yy.sqrt()
    cosine = torch.where(norms > 0, xy / norms, torch.zeros_like(norms))
    return 1.0 / (1.0 - cosine).clamp(min=0.5)
