# SPDX-License-Identifier: Apache-2.0
"""Measures how far updates with a factored second moment are from those with a dense one.

The error ratio xi compares the matrix of one step with its own factors. But errors accumulate over
steps, which only a second moment that was never compressed can show. :class:`Shadow` keeps such a
dense moment beside the optimizer's. It needs AdamW's memory, so it is for measurements only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.core.layout import Block


@dataclass(frozen=True, slots=True)
class ShadowErrors:
    """The errors of one factored block in one step, compared with its dense moment.

    Attributes:
        moment: the relative Frobenius error of V.
        update: the relative Frobenius error of X = G / (sqrt(V) + eps), before clipping.
        clipped_update: the same after both X were clipped by their root mean square.
        largest: the largest magnitude of an entry of X.
        vanished: the part of the entries that the factors give as 0, so that V there has only this
            step's squared gradient.
        clip: the number that clipping divides X by; 1 where it changes nothing.
    """

    moment: float
    update: float
    clipped_update: float
    largest: float
    vanished: float
    clip: float


class Shadow:
    """Keeps dense second moments beside an Adapprox, and compares them; changes nothing of it.

    Args:
        optimizer: the optimizer, before its first step.
        every: the number of steps between comparisons; the dense moments follow every step.

    Attributes:
        records: the results of the comparisons by parameter name, in the order of steps.

    Raises:
        ValueError: the optimizer has a group with ``scope="matrix"``.
    """

    def __init__(self, optimizer: Adapprox, every: int = 10) -> None:
        if any(group["scope"] == "matrix" for group in optimizer.param_groups):
            raise ValueError(
                "Shadow: scope='matrix' is not allowed; allowed: 'partition', where a process can "
                "compare its factors with what they are of"
            )
        self.records: dict[str, list[ShadowErrors]] = defaultdict(list)
        self._every = every
        self._dense: dict[tuple[Tensor, int], Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)

    def mean(self, last: int) -> ShadowErrors:
        """The mean over parameters of the mean over the last ``last`` records of each."""
        tails = [records[-last:] for records in self.records.values()]
        return ShadowErrors(
            **{
                f.name: _mean([_mean([getattr(r, f.name) for r in tail]) for tail in tails])
                for f in fields(ShadowErrors)
            }
        )

    @torch.no_grad()
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            h = Hyperparameters.of_group(group)
            active = [p for p in group["params"] if p.grad is not None]
            optimizer.shards.locate(active)
            for p in active:
                self._follow(optimizer, p, optimizer.state.get(p), h)

    def _follow(self, optimizer: Adapprox, p: Tensor, state: Any, h: Hyperparameters) -> None:
        grad = p.grad
        assert grad is not None
        t = int(state["step"]) + 1 if state else 1
        factors = state["exp_avg_sq"].store.factors if state else []
        domain = state["exp_avg_sq"].store.domain if state else h.domain
        for i, block in enumerate(optimizer.shards.layouts[p].blocks):
            g = block.view(grad.reshape(-1)).float()
            dense = self._dense.setdefault((p, i), torch.zeros_like(g))
            dense.mul_(h.betas[1]).addcmul_(g, g, value=1.0 - h.betas[1])
            if factors and t % self._every == 0:
                self.records[block.name].append(_compare(block, factors[i], domain, dense, g, t, h))


def _compare(
    block: Block,
    factors: Factors,
    domain: str,
    dense: Tensor,
    g: Tensor,
    t: int,
    h: Hyperparameters,
) -> ShadowErrors:
    """Compare V and X of a step from the factors with those from the dense moment.

    Args:
        block: the block.
        factors: its factors before the step.
        domain: what the factors approximate, "variance" or "std".
        dense: the dense second moment after the step, (rows, cols), fp32.
        g: the gradient, of the same shape, fp32.
        t: the number of the step, 1 at the first.
        h: the settings.
    """
    held = factors.reconstruct(domain).float()
    vanished = float((held == 0).float().mean())
    if h.floor:
        least = torch.outer(held.mean(1), held.mean(0)) / held.mean().clamp(min=1e-38)
        held = torch.maximum(held, h.floor * least)
    v = h.betas[1] * held + (1.0 - h.betas[1]) * g * g
    correction = 1.0 - h.betas[1] ** t if h.bias_correction else 1.0
    x, exact = (g / ((m / correction).sqrt() + h.least_denominator) for m in (v, dense))
    clip, exact_clip = (
        max(1.0, float(u.norm()) / math.sqrt(u.numel()) / h.clip_threshold) for u in (x, exact)
    )
    return ShadowErrors(
        moment=_relative(v, dense),
        update=_relative(x, exact),
        clipped_update=_relative(x / clip, exact / exact_clip),
        largest=float(x.abs().max()),
        vanished=vanished,
        clip=clip,
    )


def _relative(value: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    return float((value - exact).norm()) / norm if norm else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
