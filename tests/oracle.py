# SPDX-License-Identifier: Apache-2.0
"""Algorithms 1-3 of the paper, written naively in fp64, for a whole matrix or a ZeRO fragment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapprox_ds.lowrank.srsi import gaussian_sketch


@dataclass(kw_only=True)
class Settings:
    """The hyper-parameters, spelled as in the paper's Algorithm 3."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9
    eps: float = 1e-8
    clip: float = 1.0
    decay: float = 0.1
    k0: int = 3
    kmin: int = 1
    kmax: int = 3
    delta: int = 1
    xi: float = 1e-3
    l: int = 2  # noqa: E741
    p: int = 2
    seed: int = 0
    maximize: bool = False


def most_square(shape: Sequence[int]) -> tuple[int, int] | None:
    """Brute force: of all row-major splits the one with the smallest |rows - cols|."""
    best = None
    for i in range(1, len(shape)):
        split = (math.prod(shape[:i]), math.prod(shape[i:]))
        if best is None or abs(split[0] - split[1]) < abs(best[0] - best[1]):
            best = split
    return best


@dataclass
class Block:
    """Q, U and the rank moment of one block of whole rows."""

    indices: Tensor
    shape: tuple[int, int]
    first_row: int
    kmax: int
    rank: float
    v_hat: Tensor
    ranks: list[int] = field(default_factory=list)
    xi: float = math.nan


class FragmentOracle:
    """One contiguous fragment [begin, end) of a parameter, trained by Algorithm 3 in fp64."""

    def __init__(
        self, name: str, value: Tensor, s: Settings, begin: int = 0, end: int | None = None
    ) -> None:
        self.name, self.s, self.t = name, s, 0
        end = value.numel() if end is None else end
        self.w = value.reshape(-1)[begin:end].double().clone()
        self.m = torch.zeros_like(self.w)
        self.v = torch.zeros_like(self.w)  # logical second moment: dense, or [Q U^T]_+
        self.block: Block | None = None
        matrix = most_square(value.shape)
        if matrix is None:
            return
        cols = matrix[1]
        whole = [
            r for r in range(matrix[0]) if begin <= r * cols and (r + 1) * cols <= end
        ]  # rows that lie in the fragment from end to end
        bound = 0
        while (bound + 1) * (len(whole) + cols) < len(whole) * cols:
            bound += 1
        if bound:
            indices = torch.arange(whole[0] * cols - begin, (whole[-1] + 1) * cols - begin)
            kmax = min(s.kmax, bound)
            zero = torch.zeros(len(whole), cols, dtype=torch.float64)
            self.block = Block(
                indices, (len(whole), cols), whole[0], kmax, float(min(s.k0, kmax)), zero
            )

    def step(self, gradient: Tensor) -> None:
        """One step of Algorithm 3 with this fragment's gradient."""
        s = self.s
        self.t += 1
        g = gradient.double() * (-1.0 if s.maximize else 1.0)
        v = s.beta2 * self.v + (1 - s.beta2) * g**2
        x = g / (v.sqrt() + s.eps)
        x = x / max(1.0, float(x.norm()) / math.sqrt(x.numel()) / s.clip)
        self.m = s.beta1 * self.m + (1 - s.beta1) * x if s.beta1 > 0 else x
        self.w = self.w - s.lr * (self.m + s.decay * self.w)
        self.v = v
        if self.block is not None:
            self.v = v.clone()
            self.v[self.block.indices] = self._as_rsi(v[self.block.indices]).reshape(-1)

    def _as_rsi(self, flat: Tensor) -> Tensor:
        """Algorithms 1 and 2 on V_t; returns [Q U^T]_+."""
        s, b = self.s, self.block
        assert b is not None
        a = flat.reshape(b.shape)
        k = max(1, math.floor(b.rank + 0.5))
        width = min(k + s.p, *b.shape)
        like = torch.empty(0, dtype=torch.float32)
        u = gaussian_sketch(s.seed, self.name, b.first_row, self.t, (b.shape[1], width), like)
        u = u.double()
        for _ in range(s.l):
            q, _ = torch.linalg.qr(a @ u)
            u = a.T @ q
        approx = q[:, :k] @ u[:, :k].T
        norm = float(a.norm())
        b.xi = float((a - approx).norm()) / norm if norm else 0.0
        moved = b.rank + s.delta if b.xi > s.xi else b.rank - s.delta
        moved = min(b.kmax, max(min(s.kmin, b.kmax), moved))
        b.rank = s.beta3 * b.rank + (1 - s.beta3) * moved
        b.ranks.append(k)
        return approx.clamp(min=0)
