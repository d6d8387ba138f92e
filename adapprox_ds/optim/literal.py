# SPDX-License-Identifier: Apache-2.0
"""Algorithm 3 as the paper writes it, for one fragment: V is formed, S-RSI starts cold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import rank_in_use
from adapprox_ds.lowrank.srsi import error_ratio, gaussian_sketch, sketch_width, srsi
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.zero.layout import FragmentLayout, MatrixBlock


def update_fragment(
    part: FragmentLayout,
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    dense: list[Tensor],
    factors: list[FactoredBlock],
    t: int,
    h: Hyperparameters,
) -> list[Tensor]:
    """One step for one fragment; arguments and result as in :func:`tracking.update_fragment`.

    Needs about four times the fragment's size of transient memory.
    """
    g = g.to(dense[0].dtype if dense else factors[0].q.dtype)
    g = -g if h.maximize else g
    (beta1, beta2), start, errors = h.betas, part.fragment.offset, []
    correction = math.sqrt(1.0 - beta2**t) if h.bias_correction else 1.0
    x = torch.empty_like(g)
    for run, v in zip(part.runs, dense, strict=True):
        here = slice(run.offset - start, run.offset - start + run.numel)
        v.mul_(beta2).addcmul_(g[here], g[here], value=1.0 - beta2)
        torch.div(g[here], v.sqrt().div_(correction).add_(h.eps), out=x[here])
    for block, f in zip(part.blocks, factors, strict=True):
        here = slice(block.offset - start, block.offset - start + block.numel)
        gm, xm = g[here].view(block.rows, block.cols), x[here].view(block.rows, block.cols)
        v = f.reconstruct(h.factor).mul_(beta2).addcmul_(gm, gm, value=1.0 - beta2)  # line 5
        torch.div(gm, v.sqrt().div_(correction).add_(h.eps), out=xm)  # line 8: V, not Q U^T
        errors.append(_compress(v, f, block, t, h))  # lines 6-7
    rms = torch.linalg.vector_norm(x) / math.sqrt(x.numel())
    x.div_((rms / h.clip_threshold).clamp_(min=1.0))  # line 9, the clipping mechanism
    if m is not None:  # lines 10-12
        x = m.to(x.dtype).lerp(x, 1.0 - beta1)
        m.copy_(x)
    lr = h.learning_rate
    w.copy_(w.to(x.dtype).mul(1.0 - lr * h.weight_decay).sub_(x, alpha=lr))  # line 13
    return errors


def _compress(
    v: Tensor, f: FactoredBlock, block: MatrixBlock, t: int, h: Hyperparameters
) -> Tensor:
    """Algorithm 2: factor V_t with the rank in force; the error ratio sets the next rank."""
    a = v.sqrt() if h.factor == "std" else v
    k = rank_in_use(f.rank)
    width = sketch_width(k, h.oversampling, block.rows, block.cols)
    sketch = gaussian_sketch(h.seed, block.name, block.first_row, t, (block.cols, width), a)
    f.q, f.u = srsi(a, k, sketch, h.iterations)
    return error_ratio(a, f.q, f.u)
