# SPDX-License-Identifier: Apache-2.0
"""What keeps a dense second moment, gathered: vectors, tiny matrices and rows cut by ZeRO.

There are many of them and they are small, so they are computed end to end and written back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.kernels.means import keep_rows, load_rows
from adapprox_ds.kernels.tiles import agreement_terms, apply_update
from adapprox_ds.optim.fragment import Fragment


class DenseRuns:
    """The dense runs of some fragments that have one device and dtype of factors.

    Args:
        fragments: in the order of the clips.
    """

    def __init__(self, fragments: list[Fragment]) -> None:
        self.fragments = fragments
        self.v = [v for f in fragments for v in f.dense]
        dtype, device = fragments[0].dtype, fragments[0].device
        lengths = [sum(v.numel() for v in f.dense) for f in fragments]
        self.numel = sum(lengths)
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        if device.type != "cpu":
            self.lengths = self.lengths.pin_memory().to(device, non_blocking=True)
        self.empty = torch.empty(0, dtype=dtype, device=device)

    def measure(self, s: StepScalars) -> Tensor:
        """Update the second moments; returns the sum of X^2 of each fragment, (F,)."""
        squares = self.empty.new_zeros(len(self.fragments))
        if not self.v:
            return squares
        self.g = self._gather([r for f in self.fragments for r in f.runs(f.g)])
        self.means = [m for f in self.fragments for m in f.mean_runs]
        dtype = self.empty.dtype
        loaded = [load_rows(m, 0, 1, dtype).flatten() for m in self.means]
        self.m = torch.cat(loaded) if loaded else None
        v = self._gather(self.v).mul_(s.beta2).addcmul_(self.g, self.g, value=1.0 - s.beta2)
        torch._foreach_copy_(self.v, list(v.split([x.numel() for x in self.v])))
        self.denominator = v.sqrt_().mul_(s.correction).add_(s.eps)
        if not s.clips:
            return squares
        return self._sum((self.g / self.denominator).square_())

    def agreement(self, s: StepScalars) -> Tensor:
        """What :func:`tiles.agreement` gives, of each fragment, (F, 3); after :meth:`measure`."""
        if not self.v:
            return self.empty.new_zeros(len(self.fragments), 3)
        assert self.m is not None
        terms = agreement_terms(self.g, self.m, self.denominator, s)
        return torch.stack([self._sum(x) for x in terms], dim=1)

    def update(self, clip: Tensor, s: StepScalars) -> None:
        """Update first moments and weights.

        Args:
            clip: of each fragment, (F,).
            s: the step's numbers.
        """
        if not self.v:
            return
        views = [r for f in self.fragments for r in f.runs(f.w)]
        w = self._gather(views)
        spread = clip.repeat_interleave(self.lengths, output_size=self.numel)
        apply_update(w, self.m, self.g, self.denominator, spread if s.clips else None, s)
        sizes = [x.numel() for x in views]
        torch._foreach_copy_(views, list(w.split(sizes)))
        if self.m is None:
            return
        kept = [x[None] for x in self.m.split(sizes)]
        same = [m for m in self.means if isinstance(m, Tensor) and m.dtype == self.m.dtype]
        if len(same) == len(kept):
            torch._foreach_copy_(same, kept)
        else:
            for m, rows in zip(self.means, kept, strict=True):
                keep_rows(m, 0, rows, s.salt)

    def _sum(self, x: Tensor) -> Tensor:
        # In the order of elements, on any device: bits repeat.
        return torch.segment_reduce(x, "sum", lengths=self.lengths, unsafe=True)

    def _gather(self, views: list[Tensor]) -> Tensor:
        return torch.cat([x.to(self.empty.dtype) for x in views])
