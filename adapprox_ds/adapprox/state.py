# SPDX-License-Identifier: Apache-2.0
"""The state of one flat tensor: made anew, checked after a load, or converted from an Adam's."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors, FactorStore
from adapprox_ds.adapprox.hyperparameters import CODE_BITS, Hyperparameters
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.quantized import QuantizedMatrix, QuantizedMoment, QuantizedStore
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.adapprox.sketch import gaussian_sketch, sketch_width
from adapprox_ds.adapprox.srsi import error_ratio, srsi
from adapprox_ds.core.layout import Block, ShardLayout, gather_runs
from adapprox_ds.core.state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    compute_dtype,
    settle_compensation,
    settle_step,
)

_log = logging.getLogger(__name__)

#: The power iterations with which a dense moment is factored from a random sketch: the paper's l.
_FACTORING_ITERATIONS = 5


def factor_dtype(dtype: torch.dtype, h: Hyperparameters) -> torch.dtype:
    """The dtype in which the factors of a parameter are kept."""
    return torch.bfloat16 if h.factor_dtype == "bf16" else compute_dtype(dtype)


def new_moment(like: Tensor, layout: ShardLayout, h: Hyperparameters) -> LowRankMoment:
    """The second moment V_0 = 0, of rank k_0 and shaped like the flat tensor."""
    store = FactorStore.zeros(
        layout.numel,
        layout.blocks,
        [(r.offset, r.numel) for r in layout.runs],
        h.rank_init,
        h.rank_control,
        h.domain,
        dtype=compute_dtype(like.dtype),
        factor_dtype=factor_dtype(like.dtype, h),
        device=like.device,
    )
    return LowRankMoment(store, like.shape, like.dtype)


def new_first_moment(like: Tensor, layout: ShardLayout, h: Hyperparameters) -> Tensor:
    """The first moment M_0 = 0, shaped like the flat tensor, in the form ``h.first_moment``."""
    if bits := CODE_BITS.get(h.first_moment):
        store = QuantizedStore.zeros(layout.numel, layout.spans, like.device, bits)
        return QuantizedMoment(store, like.shape, like.dtype)
    return torch.zeros_like(like, dtype=plain_dtype(like, h), memory_format=torch.contiguous_format)


def plain_dtype(like: Tensor, h: Hyperparameters) -> torch.dtype:
    """The dtype of a first moment that is an ordinary tensor: fp64 for fp64 parameters."""
    return torch.bfloat16 if h.first_moment == "bf16" else compute_dtype(like.dtype)


def first_moment_pieces(
    moment: Tensor, layout: ShardLayout
) -> list[list[Tensor | QuantizedMatrix]]:
    """For each fragment the first moments of its block's tiles and of its dense runs, all 2-D."""
    pieces: list[Tensor | QuantizedMatrix]
    spans = layout.spans
    if isinstance(moment, QuantizedMoment):
        pieces = [moment.store.matrix(i) for i in range(len(spans))]
    else:
        flat = moment.view(-1)
        pieces = [flat[at : at + rows * cols].view(rows, cols) for at, rows, cols in spans]
    tiles, runs = iter(pieces), islice(pieces, len(spans) - len(layout.runs), None)
    return [
        [*islice(tiles, len(part.tiles)), *islice(runs, len(part.runs))]
        for part in layout.fragments
    ]


def _as_kept(moment: Tensor, p: Tensor, layout: ShardLayout, h: Hyperparameters) -> Tensor:
    """A first moment, converted to the form that the settings ask for.

    Raises:
        RuntimeError: its codes are those of another partition.
    """
    if isinstance(moment, QuantizedMoment):
        if moment.store.spans != tuple(layout.spans):
            raise RuntimeError(
                "the loaded exp_avg holds codes of another partition, model or parameter order. "
                "Resume with the same ones, or go through a universal checkpoint"
            )
        if CODE_BITS.get(h.first_moment) == moment.store.bits:
            return moment
        # It is read in full precision, whatever dtype the tensor shows.
        wide = compute_dtype(p.dtype)
        moment = moment.store.read(0, moment.numel(), wide).view(p.shape)
    if bits := CODE_BITS.get(h.first_moment):
        store = QuantizedStore.from_dense(moment.reshape(-1), layout.spans, bits)
        return QuantizedMoment(store, p.shape, p.dtype)
    dtype = plain_dtype(p, h)
    if moment.dtype == dtype and moment.is_contiguous() and not moment.is_neg():
        return moment
    return moment.to(dtype).resolve_neg().contiguous()


def new_state(p: Tensor, layout: ShardLayout, h: Hyperparameters) -> dict[str, Any]:
    """The state of a parameter or shard before its first step.

    Returns:
        ``step`` (0-dim fp32 on the CPU, as in torch), ``exp_avg`` (shaped like ``p``, in the form
        ``first_moment``; absent where beta_1 = 0), ``exp_avg_sq`` (a :class:`LowRankMoment`) and,
        for 16-bit weights that are to have one, ``compensation``.
    """
    state: dict[str, Any] = {STEP: torch.zeros((), dtype=torch.float32, device="cpu")}
    if h.betas[0] > 0:
        state[FIRST_MOMENT] = new_first_moment(p, layout, h)
    state[SECOND_MOMENT] = new_moment(p, layout, h)
    settle_compensation(state, p, h.weight_rounding)
    return state


def make_ready(
    state: dict[str, Any], p: Tensor, layout: ShardLayout, h: Hyperparameters
) -> FactorStore:
    """Convert a state, which is empty, loaded or an Adam's, to the form that a step uses.

    Returns:
        The store of the second moment.

    Raises:
        RuntimeError: a moment has another size or was factored for another partition, or there is
            no step count.
    """
    if not state:
        state.update(new_state(p, layout, h))
    settle_step(state)
    for key in (FIRST_MOMENT, SECOND_MOMENT):
        if key in state and state[key].numel() != p.numel():
            raise RuntimeError(
                f"the loaded {key} has {state[key].numel()} elements where the parameter or shard "
                f"has {p.numel()}: it was saved with another model or world size"
            )
    if FIRST_MOMENT in state:
        state[FIRST_MOMENT] = _as_kept(state[FIRST_MOMENT], p, layout, h)
    elif h.betas[0] > 0:
        state[FIRST_MOMENT] = new_first_moment(p, layout, h)
    settle_compensation(state, p, h.weight_rounding)
    moment = state[SECOND_MOMENT]
    if isinstance(moment, LowRankMoment):
        require_match(moment, layout)
        if moment.store.domain == h.domain:
            if moment.store.written:
                _factor_written(moment.store, layout, h, int(state[STEP]))
            for block in moment.store.factors:
                kept_in = factor_dtype(p.dtype, h)  # another one than it was saved in, perhaps
                block.q, block.u = block.q.to(kept_in), block.u.to(kept_in)
            return moment.store
        _log.warning("warm_start is now %r: factoring a second moment anew", h.warm_start)
        moment = moment.to_dense()
    state[SECOND_MOMENT] = factor_dense(moment, layout, h, int(state[STEP]))
    store: FactorStore = state[SECOND_MOMENT].store
    return store


def factor_dense(
    dense: Tensor, layout: ShardLayout, h: Hyperparameters, step: int
) -> LowRankMoment:
    """A dense second moment (from a universal or an AdamW checkpoint) as factors of rank k_0.

    Args:
        dense: the second moment, shaped like the flat tensor.
        layout: the layout of the flat tensor.
        h: the group's settings.
        step: the number of steps done so far, which seeds the sketch.

    Raises:
        RuntimeError: several processes factor a matrix together.
    """
    if shares := [b.name for b in layout.blocks if b.matrix_rows is not None]:
        raise RuntimeError(
            "a dense exp_avg_sq was loaded, and with scope='matrix' no process can factor its part "
            f"of {shares[0]!r} alone; load the checkpoint by adapprox_ds.load_universal"
        )
    moment = new_moment(dense, layout, h)
    flat = dense.reshape(-1).to(moment.store.dense.dtype)
    moment.store.dense.copy_(gather_runs(layout.runs, flat))
    for block, factors in zip(layout.blocks, moment.store.factors, strict=True):
        _factor(block, factors, block.view(flat), h, step)
    return moment


def _factor(block: Block, factors: Factors, v: Tensor, h: Hyperparameters, step: int) -> None:
    """Replace a block's factors by those of ``v``, (rows, cols), at their present rank."""
    v = v.sqrt() if h.domain == "std" else v
    k = rank_in_use(factors.rank)
    width = sketch_width(k, h.oversampling, block.rows, block.cols)
    sketch = gaussian_sketch(h.seed, block.name, block.first_row, step, (block.cols, width), v)
    q, u = srsi(v, k, sketch, _FACTORING_ITERATIONS)
    factors.error = float(error_ratio(v, q, u))
    factors.q, factors.u = q.to(factors.q.dtype), u.to(factors.u.dtype)


def _factor_written(store: FactorStore, layout: ShardLayout, h: Hyperparameters, step: int) -> None:
    """Factor the blocks over which values were written since the last step, at rank k_0."""
    for block, factors in zip(layout.blocks, store.factors, strict=True):
        if any(a < block.end and block.offset < a + len(x) for a, x in store.written):
            v = store.read(block.offset, block.end, store.dense.dtype)
            factors.rank = float(h.rank_control.clip(h.rank_init, block.rank_bound))
            _factor(block, factors, v.view(block.rows, block.cols), h, step)
    store.written = []


def require_match(moment: LowRankMoment, layout: ShardLayout) -> None:
    """Raise unless the moment was factored for this very layout.

    Raises:
        RuntimeError: it was factored for another partition, model or parameter order.
        ValueError: factors or a rank do not fit their block: the state is damaged.
    """
    if moment.store.matched is layout:
        return
    ours = list(layout.blocks)
    theirs = [f.block for f in moment.store.factors]
    runs = tuple((r.offset, r.numel) for r in layout.runs)
    if moment.store.numel == layout.numel and ours == theirs and moment.store.runs == runs:
        moment.store.require_fit()
        moment.store.matched = layout
        return
    raise RuntimeError(
        f"the loaded exp_avg_sq holds {len(theirs)} matrix blocks in {moment.store.numel} elements "
        f"where this shard has {len(ours)} in {layout.numel}, or cuts them elsewhere: it was saved "
        "with another model, world size, parameter order, scope or right_factor. Resume with the "
        "same ones, or go through a universal checkpoint"
    )
