# SPDX-License-Identifier: Apache-2.0
"""Creates MicroAdam's state of a parameter or shard, and checks a loaded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.core.state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    compute_dtype,
    settle_compensation,
    settle_step,
)
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.grid import Span, cut, slots_of
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.tensors import FeedbackError, WindowMean, WindowSquare
from adapprox_ds.micro_adam.window import WindowStore

#: The state key of the error feedback.
ERROR = "error"


def spans_of(layout: ShardLayout, block: int) -> tuple[Span, ...]:
    """The spans of a flat tensor, in the order of their offsets; ``block`` is the block size."""
    fragments = (part.fragment for part in layout.fragments)
    return tuple(span for f in fragments for span in cut(f.start, f.numel, f.offset, block))


def new_stores(
    layout: ShardLayout, h: MicroHyperparameters, dtype: torch.dtype, device: torch.device | str
) -> tuple[WindowStore, ErrorStore]:
    """An empty window and an error of 0.

    Args:
        layout: the layout of the flat tensor.
        h: the settings of its group.
        dtype: the dtype of the flat tensor.
        device: its device.
    """
    spans = spans_of(layout, h.block_size)
    window = WindowStore.zeros(
        layout.numel,
        h.grid,
        spans,
        window=h.window,
        density=h.density,
        betas=h.betas,
        device=device,
    )
    error = ErrorStore.zeros(
        layout.numel, h.grid, spans, h.quant_bits, dtype=compute_dtype(dtype), device=device
    )
    return window, error


def state_of(p: Tensor, window: WindowStore, error: ErrorStore, step: int) -> dict[str, Any]:
    """The state of a parameter or shard.

    Args:
        p: the parameter or shard.
        window: its window.
        error: its error.
        step: the number of steps done.

    Returns:
        A dict of ``step``, 0-dim, fp32 and on the CPU, as in torch; ``exp_avg`` and ``exp_avg_sq``,
        the moments, which share the window; and ``error``.
    """
    mean = WindowMean(window, p.shape, p.dtype)
    return {
        STEP: torch.tensor(float(step), dtype=torch.float32, device="cpu"),
        FIRST_MOMENT: mean,
        SECOND_MOMENT: WindowSquare.of(mean),
        ERROR: FeedbackError(error, p.shape, p.dtype),
    }


def make_ready(
    state: dict[str, Any], p: Tensor, layout: ShardLayout, h: MicroHyperparameters
) -> tuple[WindowStore, ErrorStore]:
    """Fill in a new state, or check and complete a loaded one.

    Args:
        state: the state; changed.
        p: the parameter or shard.
        layout: its layout.
        h: the settings of its group.

    Returns:
        The window and the error in the state.

    Raises:
        RuntimeError: the state is of another optimizer, another partition or other settings.
    """
    if not state:
        state.update(state_of(p, *new_stores(layout, h, p.dtype, p.device), 0))
    mean, error = state.get(FIRST_MOMENT), state.get(ERROR)
    if not isinstance(mean, WindowMean) or not isinstance(error, FeedbackError):
        raise RuntimeError(
            f"MicroAdam: the loaded state holds {sorted(state)}, dense or of another optimizer; "
            "allowed: a checkpoint that MicroAdam saved, loaded by engine.load_checkpoint, or "
            "converted by python -m adapprox_ds convert and loaded by adapprox_ds.load_universal"
        )
    settle_step(state)
    settle_compensation(state, p, h.weight_rounding)
    tie(state)
    _require_match(mean.store, error.store, layout, h)
    return mean.store, error.store


def tie(state: dict[str, Any]) -> None:
    """Let both moments share one window again, where loading or copying made two of it."""
    mean, square = state.get(FIRST_MOMENT), state.get(SECOND_MOMENT)
    if not isinstance(mean, WindowMean):
        return
    if not isinstance(square, WindowSquare) or square.store.window is not mean.store:
        state[SECOND_MOMENT] = WindowSquare.of(mean)


def _require_match(
    window: WindowStore, error: ErrorStore, layout: ShardLayout, h: MicroHyperparameters
) -> None:
    """Raise unless window and error have this layout and these settings."""
    spans = spans_of(layout, window.grid.block)
    for held, place in ((window, "exp_avg"), (error, "error")):
        if (held.numel, held.spans) != (layout.numel, spans):
            raise RuntimeError(
                f"MicroAdam: the loaded {place} holds {len(held.spans)} runs of blocks in "
                f"{held.numel} elements where this shard has {len(spans)} in {layout.numel}, or "
                "cuts them elsewhere: it was saved with another model, world size or parameter "
                "order. Resume with the same ones, or go through a universal checkpoint"
            )
    slots = tuple(slots_of(span, h.density) for span in spans)
    for name, saved, fits in (
        ("window", window.window, window.window == h.window),
        ("block_size", window.grid.block, window.grid.block == h.block_size),
        ("density", "another", window.slots == slots),
        ("quant_bits", error.bits, error.bits == h.quant_bits),
        ("quant_block_size", error.grid.group, error.grid.group == h.quant_block_size),
    ):
        if not fits:
            raise RuntimeError(
                f"MicroAdam: {name}={getattr(h, name)!r} and the state has {saved}: it cannot "
                "change within a run; load a universal checkpoint with load_groups=False"
            )
