# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 of the MicroAdam paper on one fragment of a parameter, dense and plain.

Written from the paper's pseudocode; knows nothing of the package. What the algorithm keeps in fewer
bits is rounded here too: the window's values to bf16, a group's minimum and maximum to fp32.
One line departs from the paper: where a group has both signs, 0 is one of what its codes stand for.

``alpha`` is of the authors' package, not of the paper: of the error e that a step leaves, as its
codes read, alpha e is added to the update, and (1 - alpha) e is quantised anew and kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroSettings:
    """The paper's letters: m = window, k = density * B_d, B_d = block, b = bits, B_q = group."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    window: int = 10
    density: float = 0.01
    block: int = 4096
    bits: int = 4
    group: int = 128
    alpha: float = 0.0


class MicroFragmentOracle:
    """The elements [begin, end) of a parameter.

    Attributes:
        w, m, v, e: weights, moments without bias correction, and error, in fp64.
        t: steps done.
    """

    def __init__(
        self,
        start: Tensor,
        s: MicroSettings,
        begin: int = 0,
        end: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """``dtype``: of accumulators and codes, whose rounding decides what is taken."""
        end = start.numel() if end is None else end
        self.w = start.reshape(-1)[begin:end].double()
        self.s, self.begin, self.dtype, self.t = s, begin, dtype, 0
        self._error = torch.zeros(end - begin, dtype=dtype)
        self._rows: list[Tensor] = []

    @property
    def e(self) -> Tensor:
        return self._error.double()

    @property
    def m(self) -> Tensor:
        return self._mean(self.s.beta1, 1)

    @property
    def v(self) -> Tensor:
        return self._mean(self.s.beta2, 2)

    def _mean(self, beta: float, power: int) -> Tensor:
        total = torch.zeros_like(self.w)
        for age, row in enumerate(reversed(self._rows)):
            total += (1.0 - beta) * beta**age * row**power
        return total

    def _cuts(self, size: int) -> Iterator[slice]:
        """The fragment's part of each piece of ``size`` elements of the parameter."""
        end = self.begin + len(self.w)
        for first in range(self.begin // size * size, end, size):
            yield slice(max(first, self.begin) - self.begin, min(first + size, end) - self.begin)

    def step(self, gradient: Tensor) -> None:
        s, a = self.s, gradient.reshape(-1).to(self.dtype) + self._error
        row = torch.zeros_like(a)
        for block in self._cuts(s.block):
            part = a[block]
            count = math.ceil(round(s.density * len(part), 9))
            places = part.abs().argsort(descending=True, stable=True)[:count]
            row[block][places] = part[places]
            part[places] = 0.0
        self._rows = [*self._rows, row.bfloat16().double()][-s.window :]
        ends = {}
        if s.bits == 4:
            for group in self._cuts(s.group):
                a[group], ends[group.start] = self._rounded(a[group], a[group].aminmax())
        self._error = a
        if s.alpha:
            self._error = (1.0 - s.alpha) * a
            for group in self._cuts(s.group) if s.bits == 4 else ():
                between = ((1.0 - s.alpha) * x for x in ends[group.start])
                self._error[group], _ = self._rounded(self._error[group], between)
        self.t += 1
        mean = self.m / (1.0 - s.beta1**self.t)
        square = self.v / (1.0 - s.beta2**self.t)
        update = mean / (s.eps + square.sqrt()) + s.alpha * a.double()
        self.w = self.w * (1.0 - s.lr * s.decay) - s.lr * update

    def _rounded(self, a: Tensor, ends: Iterable[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Codes between two ends, read again; and what the codes 0 and 15 read as."""
        low, high = (x.float().to(self.dtype) for x in ends)
        if low == high:
            return low.expand_as(a), (low, high)
        u = (high - low) / 15
        if low <= 0 <= high:
            zero = torch.floor(-low / u + 0.5).clamp(max=15)
            codes = torch.floor(a / u + zero + 0.5).clamp(0, 15)
            return (codes - zero) * u, (-zero * u, (15 - zero) * u)
        return torch.floor((a - low) / u + 0.5).clamp(0, 15) * u + low, (low, 15 * u + low)


def untied(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers whose absolute values differ within each 64 that begin at a multiple of 64.

    Which of two equal ones Top-K takes is left open. They have 6 bits, so that small multiples are
    exact in bf16, and lie between 1/16 and 1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    blocks = -(-numel // 64)
    order = torch.rand(blocks, 96, generator=generator).argsort(dim=1)[:, :64]
    sizes = (32 + order % 32) * 2.0 ** (order // 32) / 512
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2 - 1
    return (sizes * signs).flatten()[:numel].reshape(shape)
