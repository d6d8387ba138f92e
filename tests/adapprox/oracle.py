# SPDX-License-Identifier: Apache-2.0
"""Algorithms 1-3 of the paper, and the tracking step, written naively in fp64.

For a whole matrix or the fragment of one that a ZeRO rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.sketch import gaussian_sketch, sketch_key, uniform_sketches


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
    tracking: bool = False
    floor: float = 0.0
    bias_correction: bool = False
    momentum: str = "update"
    policy: str = "reflect"
    interval: int = 10
    guided: bool = False
    nesterov: bool = False

    def knobs(self) -> dict[str, Any]:
        """The same settings as Adapprox's arguments."""
        preset = {} if self.tracking else {"preset": "paper"}
        iterations = {} if self.tracking else {"power_iterations": self.l}
        return {
            **preset,
            **iterations,
            "lr": self.lr,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "weight_decay": self.decay,
            "rank_init": self.k0,
            "rank_min": self.kmin,
            "rank_max": self.kmax,
            "rank_step": self.delta,
            "rank_beta": self.beta3,
            "error_threshold": self.xi,
            "floor": self.floor,
            "bias_correction": self.bias_correction,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "rank_policy": self.policy,
            "rank_interval": self.interval,
            "guidance": "cosine" if self.guided else "none",
            "oversampling": self.p,
            "clip_threshold": self.clip,
            "seed": self.seed,
            "maximize": self.maximize,
        }


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
    held: Tensor
    q: Tensor
    u: Tensor
    ranks: list[int] = field(default_factory=list)
    xi: float = math.nan

    @property
    def rank_in_use(self) -> int:
        """The rank in force."""
        return max(1, math.floor(self.rank + 0.5))


class FragmentOracle:
    """One contiguous fragment [begin, end) of a parameter, trained by Algorithm 3 in fp64."""

    def __init__(
        self, name: str, value: Tensor, s: Settings, begin: int = 0, end: int | None = None
    ) -> None:
        self.name, self.s, self.t = name, s, 0
        self.betas: list[tuple[float, float]] = []
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
                *(indices, (len(whole), cols), whole[0], kmax, float(min(s.k0, kmax)), zero),
                q=zero.new_zeros(len(whole), 1),
                u=zero.new_zeros(cols, 1),
            )

    def step(self, gradient: Tensor) -> None:
        """One step of Algorithm 3 with this fragment's gradient."""
        s = self.s
        self.t += 1
        g = gradient.double() * (-1.0 if s.maximize else 1.0)
        v = s.beta2 * self.floored() + (1 - s.beta2) * g**2
        corrected = v / (1 - s.beta2**self.t) if s.bias_correction else v
        root = corrected.sqrt() + s.eps
        rms = float((g / root).norm()) / math.sqrt(g.numel())
        clip = max(1.0, rms / s.clip)
        # What is applied and v as sums over the gradients of all ages.
        ages = torch.arange(self.t, dtype=torch.float64)
        ages_for_ever = torch.arange(2000, dtype=torch.float64)
        of_m, of_v = (1 - s.beta1) * s.beta1**ages, (1 - s.beta2) * s.beta2**ages
        if s.nesterov:
            of_m = s.beta1 * of_m
            of_m[0] += 1 - s.beta1
        first = 1 / float(of_m.sum()) if s.bias_correction else 1.0
        # Largest: gradients that fall off as the first sum's weights over the second's.
        largest = float((of_m**2 / of_v).sum().sqrt())
        self.betas.append((s.beta1, s.beta2))
        if len(set(self.betas)) > 1:
            # What any betas between the least and the largest can make, for ever.
            (low1, low2), (high1, high2) = (
                [f(x) for x in zip(*self.betas, strict=True)] for f in (min, max)
            )
            forever = high1 ** (2 * ages_for_ever) / low2**ages_for_ever
            weights = (1 - low1) ** 2 / (1 - high2) * forever
            if s.nesterov:
                weights[1:] *= high1**2
                weights[0] *= (1 + high1) ** 2
            largest = float(weights.sum().sqrt())
        if s.bias_correction:
            largest *= math.sqrt(1 - s.beta2**self.t)
        go = 1.0
        if s.guided:
            last = self.m if s.momentum == "update" else (self.m / root).clamp(-largest, largest)
            norms = float((g / root).norm() * last.norm())
            go = 1 / max(1 - float((g / root) @ last) / norms, 0.5) if norms else 1.0
        if s.momentum == "gradient":
            self.m = s.beta1 * self.m + (1 - s.beta1) * g
            x = go * first * (self._applied(g) / root).clamp(-largest, largest) / clip
        else:
            self.m = s.beta1 * self.m + (1 - s.beta1) * g / root / clip
            x = go * first * self._applied(g / root / clip)
        self.w = self.w - s.lr * (x + s.decay * self.w)
        self.v = v
        if self.block is not None:
            self.v = v.clone()
            factor = self._track if s.tracking else self._as_rsi
            self.v[self.block.indices] = factor(v[self.block.indices]).reshape(-1)

    def _applied(self, newest: Tensor) -> Tensor:
        """The first moment, or what it would be if the newest came once more."""
        beta = self.s.beta1
        return beta * self.m + (1 - beta) * newest if self.s.nesterov else self.m

    def floored(self) -> Tensor:
        """The last second moment, at least ``floor * r c^T / mean`` where it is factored."""
        if self.block is None or not self.s.floor:
            return self.v
        held = self.block.held
        r, c = held.square().mean(1), held.square().mean(0)
        least = self.s.floor * torch.outer(r, c) / max(float(r.mean()), 1e-300)
        v = self.v.clone()
        v[self.block.indices] = torch.maximum(v[self.block.indices], least.reshape(-1))
        return v

    def _as_rsi(self, flat: Tensor) -> Tensor:
        """Algorithms 1 and 2 on V_t; returns [Q U^T]_+."""
        s, b = self.s, self.block
        assert b is not None
        a = flat.reshape(b.shape)
        k, u = self._draw()
        for _ in range(s.l):
            q, _ = torch.linalg.qr(a @ u)
            u = a.T @ q
        approx = q[:, :k] @ u[:, :k].T
        self._set_rank([_ratio(a, q[:, :j] @ u[:, :j].T) for j in range(1, k + 1)])
        return approx.clamp(min=0)

    def _track(self, flat: Tensor) -> Tensor:
        """Generalised Nystrom on the balanced root, then one iteration on the projected one."""
        s, b = self.s, self.block
        assert b is not None
        root, k, (m, n) = flat.reshape(b.shape).sqrt(), b.rank_in_use, b.shape
        rows, cols = self._weights(b.held, 1), self._weights(b.held, 0)
        target = rows[:, None] * root * cols
        sketch = self._fresh(self.t, n, min(k + s.p, m, n))
        test = self._fresh(-self.t, m, min(k + 4 * s.p, m))
        for j in range(min(b.u.shape[1], sketch.shape[1])):
            if b.u[:, j].any():
                sketch[:, j] = cols * b.u[:, j] / (cols * b.u[:, j]).norm()
                test[:, j] = rows * b.q[:, j]
        # Rows are weighed anew by what is in them now; what the pass made of the test stays.
        if b.held.any():
            old, energy = rows, (root * cols).square().sum(1)
            mean = b.held.square().mean(0).sum()
            rows = (energy / mean).clamp(min=1e-2).rsqrt()
            target = rows[:, None] * root * cols
            test *= (old / rows)[:, None]
        basis = torch.linalg.qr(target @ sketch)[0]
        if self.t <= 2 or s.clip < math.inf or s.guided:
            test = basis
        part = torch.linalg.lstsq(test.T @ basis, test.T @ target).solution
        gram = part @ part.T
        eye = torch.eye(len(gram), dtype=torch.float64)
        best = torch.linalg.qr((gram / max(gram.trace(), 1e-300) + 1e-4 * eye)[:, :k])[0]
        b.q = basis @ best / rows[:, None]
        rest = test.T @ target - test.T @ basis @ part
        variance = rest.square().sum() / max(test.shape[1] - basis.shape[1], 1)
        noise = variance * (torch.linalg.pinv(test.T @ basis).T @ best).square().sum(0)
        energy = (part.T @ best).square().sum(0)
        own = (1 - noise / energy.clamp(min=1e-300)).clamp(min=0)
        length = own * (3 - own) / 2
        b.u = part.T @ best * length / cols[:, None]
        b.held = b.q @ b.u.T
        held = (2 * length * own * energy - length**2 * energy).cumsum(0)
        missed = (1 - held / max(float(target.square().sum()), 1e-300)).clamp(min=0).sqrt()
        missed = missed if target.any() else torch.zeros(k)
        self._set_rank(missed.tolist())
        return b.held.clamp(min=0).square()

    def _weights(self, held: Tensor, axis: int) -> Tensor:
        """One over the root mean squares along an axis, relative to that of all."""
        means = held.square().mean(axis)
        if not means.any():
            return torch.ones_like(means)
        return (means / means.mean()).clamp(min=1e-2).rsqrt()

    def _fresh(self, step: int, rows: int, columns: int) -> Tensor:
        """Uniform columns of about unit norm."""
        s, b = self.s, self.block
        assert b is not None
        key = sketch_key(s.seed, self.name, b.first_row, step)
        like = torch.empty(0, dtype=torch.float64)
        return uniform_sketches([key], 0, rows, columns, rows**-0.5, like)[0]

    def _draw(self) -> tuple[int, Tensor]:
        """The rank in force and the block's Gaussian columns."""
        s, b = self.s, self.block
        assert b is not None
        k = b.rank_in_use
        size = (b.shape[1], min(k + s.p, *b.shape))
        like = torch.empty(0, dtype=torch.float32)
        return k, gaussian_sketch(s.seed, self.name, b.first_row, self.t, size, like).double()

    def _set_rank(self, errors: list[float]) -> None:
        """From the errors of 1, 2, ... columns: Algorithm 2 and the rank moment, or expansion."""
        s, b = self.s, self.block
        assert b is not None
        k, b.xi = len(errors), errors[-1]
        b.ranks.append(k)
        if s.policy == "expand":
            tried = [j for j in range(s.k0, k, s.delta) if errors[j - 1] <= s.xi]
            if self.t % s.interval == 0 and tried:
                b.rank = tried[0]
            elif b.xi > s.xi:
                b.rank = min(b.kmax, k + s.delta)
            return
        moved = b.rank + s.delta if b.xi > s.xi else b.rank - s.delta
        moved = min(b.kmax, max(min(s.kmin, b.kmax), moved))
        b.rank = s.beta3 * b.rank + (1 - s.beta3) * moved


def _ratio(a: Tensor, approx: Tensor) -> float:
    """Equation 11."""
    norm = float(a.norm())
    return float((a - approx).norm()) / norm if norm else 0.0
