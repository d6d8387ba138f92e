# SPDX-License-Identifier: Apache-2.0
"""MicroAdam: Adam whose moments are made of a window of sparse gradients, with error feedback."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.core.inputs import as_flat, write_back
from adapprox_ds.core.kernels.backends import tile_elements
from adapprox_ds.core.layout import FragmentLayout, ShardLayout
from adapprox_ds.core.nonfinite import GradientCheck
from adapprox_ds.core.rounding import weight_salt
from adapprox_ds.core.shards import ShardTable
from adapprox_ds.core.state import COMPENSATION, FIRST_MOMENT, STEP
from adapprox_ds.micro_adam.batches import Flat, batches
from adapprox_ds.micro_adam.hyperparameters import REFUSALS, MicroHyperparameters
from adapprox_ds.micro_adam.kernels.windows import backend, takes, update
from adapprox_ds.micro_adam.metrics import WindowMetrics, collect
from adapprox_ds.micro_adam.state import ERROR, make_ready, tie
from adapprox_ds.micro_adam.step import StepScalars
from adapprox_ds.micro_adam.tensors import FeedbackError, WindowMean
from adapprox_ds.micro_adam.window import row_ages


class MicroAdam(ShardOptimizer):
    """MicroAdam (arXiv 2405.15593) on parameters of any shape and on DeepSpeed's flat ZeRO shards.

    Each step adds the error that is left to the gradient, moves the largest entries of each block
    to a window of the last ``window`` steps, keeps the rest as the new error in 4 bits an element,
    and updates with the moments of the window. At the defaults state takes 0.97 bytes an element:
    0.5 of codes, 0.06 of their ranges, 0.4 of window.

    Every parameter goes this way, vectors and tiny ones too; a dense Adam would take fewer bytes
    for parameters, or parts of a block, of less than 7 elements alone (at most 49 bytes each).
    Blocks are those of the parameter; where a ZeRO partition cuts one, each rank takes the largest
    entries of its part.

    Args:
        params: parameters, named parameters, or parameter groups; every argument below can be
            overridden in a group.
        lr: learning rate, a float or a one-element tensor, which is read at every step. Default
            1e-3.
        betas: beta_1 and beta_2, the decay of the first and the second moment over the window.
            Default (0.9, 0.999).
        eps: added to the root of the second moment; where the window holds nothing the moments are
            0, so that it cannot be. Default 1e-8.
        weight_decay: decoupled weight decay, as AdamW's. Default 1e-2.
        window: m, the steps whose gradients the moments are made of. Default 10.
        density: part of a block's elements that a step moves to the window, rounded up. Default
            0.01.
        block_size: elements of a block, of which a step takes the largest; at most 32768. Blocks
            are counted from each parameter's first element. Default 4096.
        quant_bits: of the error: 4, or 32 for in full. Default 4.
        quant_block_size: elements whose 4-bit codes share a minimum and a maximum. Default 128.
        alpha: part of the error that a step leaves which is applied at once, from 0 to less than
            1: of that error e, as its codes read, the weights also move by -lr alpha e, and
            (1 - alpha) e is kept for the next step. It makes updates dense, which the authors'
            package ista-daslab-optimizers (from 1.1 on) offers for pretraining; the paper has no
            such term. It has the size of gradients, as SGD's update, which Adam's has not. Not
            with a density of 1, which leaves no error. Default 0.
        weight_rounding: how weights in bf16 or fp16 are written: "stochastic", at random;
            "compensated", with one more byte an element in the state for what is lost; or
            "nearest". Default "stochastic".
        maximize: ascend instead of descend. Default False.
        nonfinite: on NaN, infinite or too large gradients, "raise" an error that names them,
            "skip" the step (:attr:`skipped` counts), or "propagate" them, unchecked. The
            strictest of the groups stepped together holds. Default what the DeepSpeed config asks
            for: "propagate" by ``"bf16": {"check_grad_overflow": false}``, else "raise".

    Attributes:
        skipped: steps left out in this process because of such gradients.

    Raises:
        ValueError, TypeError: names the argument, its value and what is allowed.
    """

    shards: ShardTable[MicroHyperparameters]
    settings_class = MicroHyperparameters
    refusals = REFUSALS
    loads_dense_moments = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        window: int | None = None,
        density: float | None = None,
        block_size: int | None = None,
        quant_bits: int | None = None,
        quant_block_size: int | None = None,
        alpha: float | None = None,
        weight_rounding: str | None = None,
        maximize: bool | None = None,
        nonfinite: str | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__(params, locals())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Before DeepSpeed links the states of parameters to slices of these.
        for held in self.state.values():
            tie(held)

    def metrics(self) -> WindowMetrics:
        """State bytes and window entries of what this process holds."""
        return collect(self._held(), self.skipped)

    def _is_ready(self, state: dict[str, Any]) -> bool:
        return isinstance(state.get(ERROR), FeedbackError) and isinstance(
            state.get(FIRST_MOMENT), WindowMean
        )

    def _make_ready(self, p: Tensor, settings: MicroHyperparameters) -> None:
        make_ready(self.state[p], p, self.shards.layouts[p], settings)

    def _check_kernels(self, groups: list[tuple[list[Tensor], MicroHyperparameters]]) -> None:
        for p, h in self._all_at_hand(groups):
            x = _Tensor(p, self.state[p], self.shards.layouts[p], h)
            for batch in batches([x.flat], tile_elements(p.device)):
                if backend(batch) == "triton":
                    takes(batch, _scalars(h, x.t))

    def _step_groups(self, groups: list[tuple[list[Tensor], MicroHyperparameters]]) -> None:
        """One step, which writes nothing unless all gradients are finite (``nonfinite``)."""
        layouts = self.shards.layouts
        work = [
            (h, [_Tensor(p, self.state[p], layouts[p], h) for p in params]) for params, h in groups
        ]
        modes = self.shards.nonfinite(h.nonfinite for h, tensors in work if tensors)
        pieces = [piece for _, tensors in work for x in tensors for piece in x.pieces]
        with self._left_out(modes, pieces):
            if modes - {"propagate"}:
                GradientCheck.start(pieces, self.shards.norm(), self.shards.agree).require()
            for h, tensors in work:
                _step_group(tensors, h)


class _Piece(NamedTuple):
    """A fragment of a parameter with its gradient, (numel,)."""

    layout: FragmentLayout
    g: Tensor


class _Tensor:
    """A parameter or shard that a step updates; nothing of it has changed yet."""

    def __init__(
        self, p: Tensor, state: dict[str, Any], layout: ShardLayout, h: MicroHyperparameters
    ) -> None:
        # Where none is at hand kernels are chosen alone, for one like the weights.
        grad = p if p.grad is None else p.grad
        self.p, self.state, self.layout = p, state, layout
        stores = make_ready(state, p, layout, h)
        lost = state.get(COMPENSATION)
        lost = None if lost is None else lost.view(-1)
        self.flat = Flat(as_flat(p), as_flat(grad), *stores, lost)
        self.t = int(state[STEP]) + 1

    @property
    def pieces(self) -> list[_Piece]:
        """Its parameters' gradients, without padding."""
        parts = ((part, part.fragment) for part in self.layout.fragments)
        return [_Piece(part, self.flat.g[f.offset : f.offset + f.numel]) for part, f in parts]

    def finish(self) -> None:
        """Count the step, and let the parameter have its weights."""
        write_back(self.p, self.flat.w)
        # A new tensor: DeepSpeed's stock universal loader gives all sub-groups the same one.
        self.state[STEP] = torch.full_like(self.state[STEP], self.t)


def _step_group(tensors: list[_Tensor], h: MicroHyperparameters) -> None:
    """One step for parameters or shards that have the same settings."""
    alike: dict[tuple[Any, ...], list[Flat]] = defaultdict(list)
    for x in tensors:
        w, g = x.flat.w, x.flat.g
        x.flat.window.step, x.flat.window.betas = x.t, h.betas
        alike[x.t, w.device, w.dtype, g.dtype].append(x.flat)
    for (t, device, *_), flats in alike.items():
        scalars = _scalars(h, t)
        for batch in batches(flats, tile_elements(device)):
            update(batch, scalars)
            batch.write_back()
    for x in tensors:
        x.finish()


def _scalars(h: MicroHyperparameters, t: int) -> StepScalars:
    """The numbers of step ``t``, counted from 1."""
    mean, square = (
        tuple(
            (1.0 - beta) * beta**age / (1.0 - beta**t) if age < t else 0.0
            for age in row_ages(t, h.window)
        )
        for beta in h.betas
    )
    return StepScalars(
        row=(t - 1) % h.window,
        mean_weights=mean,
        square_weights=square,
        lr=h.learning_rate,
        eps=h.eps,
        weight_decay=h.weight_decay,
        ascend=h.maximize,
        weight_salt=None if h.weight_rounding == "nearest" else weight_salt(t),
        alpha=h.alpha,
    )
