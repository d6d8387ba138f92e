# SPDX-License-Identifier: Apache-2.0
"""The pass in plain torch: row tiles that stay in cache, on any device.

Arithmetic is in the dtype of the factors, of dense second moments where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import Passed, Reduced, Runs, Stack, StepScalars
from adapprox_ds.adapprox.quantized import keep_rows, load_rows
from adapprox_ds.core.kernels.backends import tile_elements
from adapprox_ds.core.rounding import is_rounded, keep_weights, load_weights


def run(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """One pass over the elements of all stacks and runs.

    Args:
        stacks: blocks with factored second moments.
        runs: elements with dense second moments.
        s: the step's numbers.
        write: update weights and moments; otherwise nothing but the results is written.
    """
    squares = (
        torch.zeros(0, dtype=torch.float64, device="cpu")
        if runs is None
        else _run_runs(runs, s, write)
    )
    return Passed([_run_stack(stack, s, write) for stack in stacks], squares)


def _run_stack(stack: Stack, s: StepScalars, write: bool) -> Reduced:
    q, blocks, cols = stack.q, len(stack.g), stack.cols
    width = 0 if stack.x is None else stack.x.shape[2]
    tests = 0 if stack.z is None else stack.z.shape[2]
    y, p = q.new_zeros(blocks, stack.rows, width), q.new_zeros(blocks, tests, cols)
    energies = q.new_zeros(blocks, stack.rows, dtype=torch.float64)
    squares = q.new_zeros(blocks, dtype=torch.float64)
    for i in range(blocks):
        for tile, (rows, columns, part) in enumerate(stack.tiles):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            g, w = (x[i][part].view(shape) for x in (stack.g, stack.w))
            m = None if stack.m is None else stack.m[i][tile]
            lost = None if stack.compensation is None else stack.compensation[i][part].view(shape)
            first = stack.first[i] + part.start
            for a, b, gt, v in _moments(stack, i, g, rows, columns, s):
                here = slice(rows.start + a, rows.start + b)
                energies[i, here] += torch.mv(v, stack.col_squares[i, columns])
                root = v.sqrt_()
                if stack.x is not None:
                    y[i, here].addmm_(root, stack.x[i, columns])
                if stack.z is not None:
                    p[i][:, columns].addmm_(stack.z[i, here].T, root)
                denominator = _denominator(root, s)
                if not write:
                    squares[i] += _update_square(gt, denominator)
                    continue
                mt = None if m is None else load_rows(m, a, b, q.dtype)
                clip = None if stack.clip is None else stack.clip[i]
                index = first + a * shape[1]
                rest = None if lost is None else lost[a:b]
                weight = load_weights(w[a:b], rest, q.dtype)
                apply_update(weight, mt, gt, denominator, clip, s)
                if weight.dtype != w.dtype:
                    keep_weights(w[a:b], rest, weight, index, s.weight_salt)
                if m is not None and mt is not None:
                    keep_rows(m, a, mt, index, s.salt)
    return Reduced(y, p, energies, squares)


def _run_runs(runs: Runs, s: StepScalars, write: bool) -> Tensor:
    """There are many runs and they are small: they are computed end to end and written back."""
    dtype, sizes = runs.v[0].dtype, [v.numel() for v in runs.v]
    lengths = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    if runs.v[0].device.type != "cpu":
        lengths = lengths.pin_memory().to(runs.v[0].device, non_blocking=True)
    g, v = (torch.cat([x.to(dtype) for x in tensors]) for tensors in (runs.g, runs.v))
    v.mul_(s.beta2).addcmul_(g, g, value=1.0 - s.beta2)
    if write:
        torch._foreach_copy_(runs.v, list(v.split(sizes)))
    denominator = _denominator(v.sqrt_(), s)
    if not write:
        x = torch.where(g == 0, g, g / denominator).square_()
        # In the order of elements, on any device: bits repeat.
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True).double()
    none = v.new_zeros(len(sizes), dtype=torch.float64)
    lost = [None] * len(sizes) if runs.compensation is None else runs.compensation
    parts = zip(runs.w, lost, strict=True)
    w = torch.cat([load_weights(x, rest, dtype) for x, rest in parts])
    m = None
    if runs.m is not None:
        m = torch.cat([load_rows(x, 0, 1, dtype).flatten() for x in runs.m])
    clip = runs.clip
    if clip is not None:
        clip = clip.repeat_interleave(lengths, output_size=len(g))
    apply_update(w, m, g, denominator, clip, s)
    kept_weights = w.split(sizes)
    if is_rounded(runs.w[0].dtype):
        for x, rest, values, first in zip(runs.w, lost, kept_weights, runs.first, strict=True):
            keep_weights(x, rest, values, first, s.weight_salt)
    else:
        torch._foreach_copy_(runs.w, list(kept_weights))
    if runs.m is None or m is None:
        return none
    kept = [x[None] for x in m.split(sizes)]
    same = [x for x in runs.m if isinstance(x, Tensor) and x.dtype == dtype]
    if len(same) == len(kept):
        torch._foreach_copy_(same, kept)
        return none
    for mean, rows, first in zip(runs.m, kept, runs.first, strict=True):
        keep_rows(mean, 0, rows, first, s.salt)
    return none


def agreement(stack: Stack, s: StepScalars) -> Tensor:
    """Of X and [M / D], M being the first moment before the step, the sums of X Y, X^2 and Y^2.

    Returns:
        (B, 3).
    """
    assert stack.m is not None
    sums = stack.q.new_zeros(len(stack.g), 3)
    for i in range(len(stack.g)):
        for tile, (rows, columns, part) in enumerate(stack.tiles):
            g = stack.g[i][part].view(rows.stop - rows.start, columns.stop - columns.start)
            for a, b, gt, v in _moments(stack, i, g, rows, columns, s):
                denominator = _denominator(v.sqrt_(), s)
                mean = load_rows(stack.m[i][tile], a, b, stack.q.dtype)
                sums[i] += torch.stack(_agreement_terms(gt, mean, denominator, s))
    return sums


def run_agreement(runs: Runs, s: StepScalars) -> Tensor:
    """What :func:`agreement` gives, of each run, (R, 3)."""
    assert runs.m is not None
    sums = []
    for g, v, m in zip(runs.g, runs.v, runs.m, strict=True):
        g = g.to(v.dtype)
        root = torch.mul(v, s.beta2).addcmul_(g, g, value=1.0 - s.beta2).sqrt_()
        mean = load_rows(m, 0, 1, v.dtype).flatten()
        sums.append(torch.stack(_agreement_terms(g, mean, _denominator(root, s), s)))
    return torch.stack(sums)


def _agreement_terms(
    g: Tensor, m: Tensor, denominator: Tensor, s: StepScalars
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of X Y, X^2 and Y^2, where an element whose gradient is 0 has X = 0."""
    x = torch.where(g == 0, g, g / denominator).mul_(s.sign)
    y = torch.where(m == 0, m, m / denominator).clamp_(-s.largest, s.largest)
    return (x * y).sum(), x.square().sum(), y.square().sum()


def apply_update(
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    denominator: Tensor,
    clip: Tensor | None,
    s: StepScalars,
) -> None:
    """Update weights and first moment in place.

    Args:
        w: weights, in the denominator's dtype.
        m: first moment, in the denominator's dtype, or None.
        g: gradient, of the same shape.
        denominator: D, of the same shape; may be overwritten.
        clip: 0-dim or of the same shape; None where nothing is clipped.
        s: the step's numbers.
    """
    dtype, rate = denominator.dtype, s.rate(m is not None)
    g = g.to(dtype)
    w.mul_(1.0 - s.lr * s.weight_decay)
    if m is not None and s.of_gradients:
        m.mul_(s.beta1).add_(g, alpha=s.gain)
        ahead = torch.mul(m, s.beta1).add_(g, alpha=s.gain) if s.nesterov else m
        x = torch.div(ahead, denominator, out=denominator).clamp_(-s.largest, s.largest)
        w.add_(x if clip is None else x.div_(clip), alpha=rate)
    else:
        if clip is not None:
            denominator.mul_(clip)
        if m is None:
            w.addcdiv_(g, denominator, value=rate)
        else:
            of_mean, of_update = s.ahead
            m.mul_(s.beta1).addcdiv_(g, denominator, value=s.gain)
            w.add_(m, alpha=rate * of_mean)
            if s.nesterov:
                w.addcdiv_(g, denominator, value=rate * of_update)


def _denominator(root: Tensor, s: StepScalars) -> Tensor:
    """D of sqrt(V), in its place, in one operation."""
    return torch.add(root.new_full((), s.eps), root, alpha=s.correction, out=root)


def _update_square(g: Tensor, denominator: Tensor) -> Tensor:
    """The sum of (G / D)^2, where an element whose gradient is 0 adds nothing: eps may be 0."""
    x = torch.where(g == 0, g, g / denominator).view(-1)
    return torch.dot(x, x)


def _moments(
    stack: Stack, i: int, g: Tensor, rows: slice, columns: slice, s: StepScalars
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Row tiles of a rectangle: (begin, end, G, V); V may be overwritten by the caller."""
    q = stack.q[i, rows]
    height = max(1, tile_elements(g.device) // g.shape[1])
    buffer = q.new_empty(min(height, len(g)), g.shape[1])
    # (sqrt(beta_2) S)^2 = beta_2 S^2
    ut = (stack.u[i, columns].T * s.beta2**0.5).contiguous()
    floor_rows = floor_cols = None
    if stack.floor_rows is not None and stack.floor_cols is not None:
        floor_rows, floor_cols = stack.floor_rows[i, rows], stack.floor_cols[i, columns]
        floor_cols = floor_cols * s.beta2**0.5
    for a in range(0, len(g), height):
        b = min(a + height, len(g))
        v, gt = buffer[: b - a], g[a:b].to(q.dtype)
        torch.mm(q[a:b], ut, out=v)
        if floor_rows is None or floor_cols is None:
            v.relu_()
        else:
            torch.maximum(v, torch.outer(floor_rows[a:b], floor_cols), out=v)
        v.square_().addcmul_(gt, gt, value=1.0 - s.beta2)
        yield a, b, gt, v
