# SPDX-License-Identifier: Apache-2.0
"""Algorithm 3 as the paper writes it, for one fragment: V is formed, S-RSI starts cold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adapprox_ds.adapprox.algebra import guidance
from adapprox_ds.adapprox.factors import Factors
from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.adapprox.sketch import gaussian_sketch, sketch_width
from adapprox_ds.adapprox.srsi import error_ratios, srsi
from adapprox_ds.core.layout import Block
from adapprox_ds.core.rounding import round_factor, rounding_salt


def update(f: Fragment, t: int, h: Hyperparameters) -> None:
    """One step for one fragment.

    Needs about four times the fragment's size of transient memory.

    Args:
        f: weights and moments are updated, factors replaced, error ratios left in ``errors``.
        t: the step, 1 at the first.
        h: the settings.
    """
    part = f.layout
    g = f.g.to(f.dtype)
    g = -g if h.maximize else g
    (beta1, beta2), start, f.errors = h.betas, part.fragment.offset, []
    first_correction, correction = h.corrections(t)
    root = torch.empty_like(g)
    for run, v in zip(part.runs, f.dense, strict=True):
        here = slice(run.offset - start, run.offset - start + run.numel)
        v.mul_(beta2).addcmul_(g[here], g[here], value=1.0 - beta2)
        torch.sqrt(v, out=root[here])
    if (block := part.block) is not None and (held := f.factors) is not None:
        here = slice(block.offset - start, block.offset - start + block.numel)
        gm, rm = (y[here].view(block.rows, block.cols) for y in (g, root))
        v = held.reconstruct(h.factor).mul_(beta2).addcmul_(gm, gm, value=1.0 - beta2)  # line 5
        torch.sqrt(v, out=rm)
        f.errors.append(_compress(v, held, block, t, h))  # lines 6-7
    root.mul_(correction).add_(h.least_denominator)
    x = g / root  # line 8: V, not Q U^T
    rms = torch.linalg.vector_norm(x) / math.sqrt(x.numel())
    clip = (rms / h.clip_limit).clamp_(min=1.0)
    x.div_(clip)  # line 9, the clipping mechanism
    mean, largest = f.read_mean(g.dtype), h.largest_quotient(t)
    if mean is not None:
        if h.guided:
            last = mean
            if h.momentum == "gradient":
                last = (mean / root).clamp_(-largest, largest)
            terms = torch.stack([(x * last).sum(), x.square().sum(), last.square().sum()])
            go = guidance(terms[None])
        new = x if h.momentum == "update" else g
        mean.lerp_(new, 1.0 - beta1)  # lines 10-12
        x = mean.lerp(new, 1.0 - beta1) if h.nesterov else mean.clone()
        if h.momentum == "gradient":
            x = x.div_(root).clamp_(-largest, largest).div_(clip)
        x.mul_(first_correction)
        if h.guided:
            x = x * go
        f.keep_mean(mean, rounding_salt(t))
    lr = h.learning_rate
    w = f.read_weights(x.dtype).mul(1.0 - lr * h.weight_decay).sub_(x, alpha=lr)  # line 13
    f.keep_weights(w, h.weight_salt(t))


def _compress(v: Tensor, f: Factors, block: Block, t: int, h: Hyperparameters) -> Tensor:
    """Algorithm 2: factor V_t with the rank in force; the error ratios set the next rank."""
    a = v.sqrt() if h.factor == "std" else v
    k = rank_in_use(f.rank)
    width = sketch_width(k, h.oversampling, block.rows, block.cols)
    sketch = gaussian_sketch(h.seed, block.name, block.first_row, t, (block.cols, width), a)
    q, u = srsi(a, k, sketch, h.iterations)
    salt, first = rounding_salt(~t), block.first_row
    f.q = round_factor(q[None], f.q.dtype, first, salt)[0]
    f.u = round_factor(u[None], f.u.dtype, first + block.rows, salt)[0]
    ratios = error_ratios(a, q, u)
    return ratios if h.expands else ratios[-1:]
