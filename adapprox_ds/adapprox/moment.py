# SPDX-License-Identifier: Apache-2.0
"""LowRankMoment: a second moment that is factors physically and a tensor logically."""

from __future__ import annotations

from typing import Any

import torch

from adapprox_ds.adapprox.factors import FactorStore
from adapprox_ds.core.compact import CompactTensor


class LowRankMoment(CompactTensor):
    """The logical dense second moment over a :class:`FactorStore`, or a lazy piece of it."""

    store: FactorStore
    store_class = FactorStore
    no_writes = (
        "{} would write into a factored second moment; to replace it, assign a dense tensor to "
        "state['exp_avg_sq'], or copy_ one to it or to a slice of it (the next step factors it)"
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if (
            isinstance(self.store, FactorStore) and self.store.written
        ):  # dense, which the first step after loading factors
            return self.to_dense().__reduce_ex__(protocol)
        return super().__reduce_ex__(protocol)

    def write(self, values: torch.Tensor) -> None:
        """Replace the piece's elements; the next step factors them."""
        self.store.write(self.start, values)

    def describe(self) -> str:
        """The ranks of the matrix blocks."""
        return f"ranks={[b.q.shape[1] for b in self.store.factors]}"
