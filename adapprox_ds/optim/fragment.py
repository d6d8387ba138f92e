# SPDX-License-Identifier: Apache-2.0
"""One fragment of a parameter with everything that a step of it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.zero.layout import DenseRun, FragmentLayout, MatrixBlock


@dataclass(slots=True, eq=False)
class Fragment:
    """Tensors are views: to update them is to update the shard.

    Attributes:
        layout: the fragment and its pieces; at most one of them is a matrix block.
        w: its weights, (numel,), updated in place.
        m: its first moment, (numel,), updated in place; None for beta_1 = 0.
        g: its gradient, (numel,).
        dense: second moments of its dense runs, updated in place.
        factors: factors of its blocks, updated in place or replaced.
        errors: where a step leaves the error ratio of each block, 0-dim.
    """

    layout: FragmentLayout
    w: Tensor
    m: Tensor | None
    g: Tensor
    dense: list[Tensor]
    factors: list[FactoredBlock]
    errors: list[Tensor] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of the fragment."""
        return self.layout.fragment.numel

    @property
    def block(self) -> MatrixBlock | None:
        """Its matrix block."""
        return self.layout.blocks[0] if self.layout.blocks else None

    def matrix(self, flat: Tensor) -> Tensor:
        """The block's (rows, cols) view of ``w``, ``m`` or ``g``."""
        (block,) = self.layout.blocks
        return flat[self._local(block)].view(block.rows, block.cols)

    def runs(self, flat: Tensor) -> list[Tensor]:
        """The dense runs' views of ``w``, ``m`` or ``g``."""
        return [flat[self._local(run)] for run in self.layout.runs]

    def _local(self, piece: MatrixBlock | DenseRun) -> slice:
        begin = piece.offset - self.layout.fragment.offset
        return slice(begin, begin + piece.numel)
