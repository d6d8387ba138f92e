# SPDX-License-Identifier: Apache-2.0
"""Algorithm 3 as the paper writes it, for one fragment: V is formed, S-RSI starts cold.

It needs about four times the fragment's size of transient memory.
"""

from __future__ import annotations

import math

import torch

from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.adapprox.sketch import gaussian_sketch, sketch_width
from adapprox_ds.adapprox.srsi import error_ratios, srsi
from adapprox_ds.core.rounding import round_factor, rounding_salt


def update(f: Fragment, t: int, h: Hyperparameters) -> None:
    """One step, numbered ``t`` from 1, for one fragment, whose error ratios go to ``errors``."""
    g = -f.g.to(f.dtype) if h.maximize else f.g.to(f.dtype)
    beta1, beta2 = h.betas
    root = torch.empty_like(g)
    for here, v in zip(f.layout.run_elements, f.dense, strict=True):  # vectors have no factors
        v.mul_(beta2).addcmul_(g[here], g[here], value=1.0 - beta2)
        torch.sqrt(v, out=root[here])
    if (block := f.block) is not None and f.factors is not None:
        q, u, like = f.factors.q, f.factors.u, (block.rows, block.cols)
        gradient = f.elements(g).view(like)
        v = f.factors.reconstruct(h.domain)  # line 4: [Q U^T]_+
        v.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)  # line 5
        torch.sqrt(v, out=f.elements(root).view(like))
        k, first = rank_in_use(f.factors.rank), block.first_row  # lines 6-7: Algorithm 2
        width = sketch_width(k, h.oversampling, *like)
        sketch = gaussian_sketch(h.seed, block.name, first, t, (block.cols, width), v)
        new_q, new_u = srsi(v, k, sketch, h.power_iterations)
        salt, after = rounding_salt(~t), first + block.rows
        f.factors.q = round_factor(new_q[None], q.dtype, first, salt)[0]
        f.factors.u = round_factor(new_u[None], u.dtype, after, salt)[0]
        errors = error_ratios(v, new_q, new_u)
        f.errors = [errors if h.expands else errors[-1:]]
    x = g / root.add_(h.least_denominator)  # line 8: of V, not of Q U^T
    rms = torch.linalg.vector_norm(x) / math.sqrt(x.numel())
    x.div_((rms / h.clip_threshold).clamp_(min=1.0))  # line 9
    if (mean := f.read_mean(g.dtype)) is not None:
        x = mean.lerp_(x, 1.0 - beta1)  # lines 10-12
        f.keep_mean(x, rounding_salt(t))
    weights = f.read_weights(x.dtype).mul(1.0 - h.learning_rate * h.weight_decay)
    f.keep_weights(weights.sub_(x, alpha=h.learning_rate), h.weight_salt(t))  # line 13
