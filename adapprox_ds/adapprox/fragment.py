# SPDX-License-Identifier: Apache-2.0
"""One fragment of a parameter with everything that a step of it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors
from adapprox_ds.adapprox.quantized import QuantizedMatrix, keep_rows, load_rows
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.core.layout import Block, FragmentLayout
from adapprox_ds.core.rounding import keep_weights, load_weights


@cache
def _name(dtype: torch.dtype) -> str:
    """A name that sorts, which dtypes do not."""
    return str(dtype)


@dataclass(eq=False)
class Fragment:
    """Tensors are views: to update them is to update the shard.

    Attributes:
        layout: the fragment, its matrix block and its dense runs.
        w: its weights, (numel,), updated in place.
        m: the first moments of its block's tiles, (rows, cols), and of its dense runs, (1, numel)
            each, in whatever form they are kept, updated in place; None for beta_1 = 0.
        g: its gradient, (numel,).
        dense: second moments of its dense runs, updated in place.
        factors: those of its block, updated in place or replaced; or None.
        compensation: what rounding took from the weights, (numel,) int8, updated in place; or None.
        errors: where a step leaves the error ratios of each block, 1-D (RankPolicy.next_rank).
    """

    layout: FragmentLayout
    w: Tensor
    m: list[Tensor | QuantizedMatrix] | None
    g: Tensor
    dense: list[Tensor]
    factors: Factors | None
    compensation: Tensor | None = None
    errors: list[Tensor] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of the fragment."""
        return self.layout.fragment.numel

    @cached_property
    def dtype(self) -> torch.dtype:
        """What its step is computed in."""
        if self.dense:
            return torch.promote_types(self.dense[0].dtype, torch.float32)
        assert self.factors is not None
        return torch.promote_types(self.factors.q.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.w.device

    @property
    def block(self) -> Block | None:
        """Its matrix block."""
        return self.layout.block

    @cached_property
    def stack_key(self) -> tuple:
        """The key by which fragments form stacks: blocks of one stack have equal keys.

        A fragment without a block has an empty key, and is sorted before the others.
        """
        block, factors = self.layout.block, self.factors
        if block is None or factors is None:
            return ()
        means = (m for m in self.block_means if isinstance(m, Tensor))
        kinds = [_name(x.dtype) for x in (self.w, self.g, factors.q, *means)]
        place = (block.rows, block.cols, block.skip, block.missing, block.u_rows or ())
        whole = (block.matrix_rows or 0, block.first_row if block.matrix_rows else 0)
        return (*place, *whole, factors.q.shape[1], rank_in_use(factors.rank), *kinds)

    def elements(self, flat: Tensor) -> Tensor:
        """The block's part of ``w`` or ``g``, 1-D."""
        return flat[self.layout.block_elements]

    def runs(self, flat: Tensor) -> list[Tensor]:
        """The dense runs' views of ``w`` or ``g``."""
        return [flat[here] for here in self.layout.run_elements]

    def read_weights(self, dtype: torch.dtype) -> Tensor:
        """The weights in full, (numel,)."""
        return load_weights(self.w, self.compensation, dtype)

    def keep_weights(self, values: Tensor, salt: int | None) -> None:
        """Write weights, (numel,); ``salt`` is that of random rounding, or None for nearest."""
        first = self.layout.fragment.start
        keep_weights(self.w, self.compensation, values, first, salt)

    @property
    def block_means(self) -> list[Tensor | QuantizedMatrix]:
        """The first moments of the block's tiles."""
        return [] if self.m is None else self.m[: len(self.layout.tiles)]

    @property
    def mean_runs(self) -> list[Tensor | QuantizedMatrix]:
        """The dense runs' first moments."""
        return [] if self.m is None else self.m[len(self.layout.tiles) :]

    def read_mean(self, dtype: torch.dtype) -> Tensor | None:
        """The whole first moment, (numel,), a new tensor; None where there is none."""
        if self.m is None:
            return None
        whole = self.w.new_empty(self.numel, dtype=dtype)
        for piece, m in zip(self.layout.pieces, self.m, strict=True):
            whole[self.layout.within(piece)] = load_rows(m, 0, len(m), dtype).flatten()
        return whole

    def keep_mean(self, whole: Tensor, salt: int) -> None:
        """Write back what :meth:`read_mean` gave, updated."""
        write_mean(self.layout, self.m or [], whole, salt)


def write_mean(
    layout: FragmentLayout, pieces: list[Tensor | QuantizedMatrix], whole: Tensor, salt: int
) -> None:
    """Write a fragment's first moment to its pieces, in whatever form they are kept.

    Args:
        layout: of the fragment.
        pieces: of its block and its dense runs, 2-D.
        whole: (numel,).
        salt: of random rounding.
    """
    for piece, m in zip(layout.pieces, pieces, strict=True):
        rows = whole[layout.within(piece)].view(len(m), -1)
        if isinstance(m, Tensor) and m.dtype == rows.dtype:
            m.copy_(rows)
        else:
            index = layout.fragment.start + piece.offset - layout.fragment.offset
            keep_rows(m, 0, rows, index, salt)
