# SPDX-License-Identifier: Apache-2.0
"""Adapprox: Adam with decoupled weight decay and a second moment of adaptive rank."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox import literal
from adapprox_ds.adapprox.factors import PendingErrors
from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import REFUSALS, Hyperparameters
from adapprox_ds.adapprox.metrics import Metrics, collect
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.presets import resolve
from adapprox_ds.adapprox.settling import check_passes
from adapprox_ds.adapprox.shards import MatrixTable
from adapprox_ds.adapprox.state import first_moment_pieces, make_ready
from adapprox_ds.adapprox.step import update, update_together
from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.core.inputs import as_flat, write_back
from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.core.nonfinite import GradientCheck
from adapprox_ds.core.state import COMPENSATION, FIRST_MOMENT, SECOND_MOMENT, STEP

_log = logging.getLogger(__name__)


class Adapprox(ShardOptimizer):
    """Adapprox on parameters of any shape and on DeepSpeed's flat ZeRO shards.

    Each parameter of two or more dimensions is treated as its most nearly square matrix; its
    second moment is kept in factors of a rank that adapts to the approximation error. Vectors,
    matrices too small to gain and, with ``scope="partition"``, rows cut by a ZeRO partition keep
    a dense second moment. By default the factors are of the second moment's root and follow it
    in one tiled pass (:mod:`adapprox_ds.adapprox.step`); ``preset="paper"`` is Algorithm 3 as it
    is written (:mod:`adapprox_ds.adapprox.literal`).

    Args:
        params: parameters, named parameters, or parameter groups; every argument below can be
            overridden in a group.
        lr: learning rate, a float or a one-element tensor, which is read at every step. AdamW's
            rates are right for the default step; sweep as you would AdamW's. Default 1e-3.
        betas: beta_1 and beta_2, the decay of the first and the second moment; (0.0, 0.999) keeps
            no first moment: least memory, slower training. Default (0.9, 0.999).
        eps: added to the root of the second moment; less than 2^-63 counts as that. Default 1e-8.
        weight_decay: decoupled weight decay, as AdamW's. Default 1e-2.
        rank_policy: how ranks adapt. "reflect" moves a rank up or down by ``rank_step`` at each
            step (Algorithm 2). "expand" starts small, raises a rank while the error ratio is too
            large, and tries smaller ones again every ``rank_interval`` steps (the paper's first
            version); only without ``warm_start``. Default "reflect".
        rank_interval: steps between tries of smaller ranks, with "expand". Default 10.
        rank_init: k_0, the initial rank. Default rank_max (rank_min with rank_policy="expand").
        rank_min: k_min, the least rank. Default 1.
        rank_max: k_max, the largest rank. Memory grows by k (m + n) numbers for a matrix (m, n),
            time with k (docs/evidence.md#memory). A matrix is further held to k < m n / (m + n),
            below which factors are smaller than the dense matrix. Default 8.
        rank_step: delta k, by which a rank moves. Default ceil(0.02 rank_max).
        rank_beta: beta_3, the decay of the rank moment: how slowly ranks move. Default 0.9.
        error_threshold: xi_thresh, the error ratio above which a rank rises; lower for higher
            ranks. Default 1e-3.
        factor_dtype: what factors are kept in: "fp32" (fp64 for fp64 parameters), or "bf16",
            rounded at random, which halves them: with twice the rank the update is nearer to the
            uncompressed one at the same bytes (docs/evidence.md#the-update). Default "fp32".
        warm_start: factor the root of the second moment, from the last factors on, in one tiled
            pass; ``False`` is the paper's Algorithm 3 as it is written: it factors the second
            moment itself from Gaussian columns on, is several times slower, and its updates are
            less accurate (docs/evidence.md#the-update). Default True.
        momentum: what the first moment is the mean of: "gradient", as in Adam, or "update", the
            clipped G / sqrt(V), as in the paper, which wants other learning rates and clipping.
            Default "gradient" with warm_start, else "update".
        nesterov: apply beta_1 M + (1 - beta_1) G (or the update, with ``momentum="update"``)
            instead of M: the newest gradient counts nearly twice, so that steps lag behind less.
            ``False`` steps as AdamW and the paper do. Default warm_start.
        floor: least second moment at use, as a part of r c^T / mean, r and c being its row and
            column means; 0 for none. Only with ``warm_start``. Default 0.1 with a momentum of
            gradients, else 0.
        first_moment: how it is kept: "fp32", in full (fp64 for fp64 parameters); "bf16", rounded
            at random; "int8" or "int4", in codes of so many bits; or "none", with beta_1 = 0
            alone. "bf16", "int8" and "int4" train as "fp32" does within noise (docs/memory.md) and
            take 2, 1.03 and 0.53 bytes a parameter; "fp32" takes 4 (fp64: 8) whatever the
            parameter's dtype. Default "fp32".
        weight_rounding: how weights in bf16 or fp16 are written, where the optimizer's own are
            (plain torch; DeepSpeed's ``bf16_master_weights_and_grads``): "stochastic", up or down
            at random, so that small updates count on average; "compensated", with one more byte a
            parameter in the state for what is lost; or "nearest", where updates below half of a
            last place, 1/512 to 1/256 of a weight in bf16, are lost. Wider weights are not
            rounded. Default "stochastic".
        guidance: "cosine" multiplies an update by 1 / max(1 - c, 1/2), c being the cosine between
            it and the first moment's before it: half for opposite ones, 1 for orthogonal ones and
            at the first step, at most 2. For a momentum of gradients alone. It is our reading of
            the paper's first version, of which no formula is public. In a small GPT at a rate of
            5.6e-3 it changed the loss by -0.005 +- 0.023 nats a byte over twelve seeds, so not
            measurably; at 8e-3, where the run without it diverged, three with it ended at 1.966
            (examples/paper/losses.py). An experiment. Default "none".
        bias_correction: divide the moments by 1 - beta_1^t and 1 - beta_2^t at use, as Adam does;
            the paper does not. Default warm_start.
        power_iterations: l of Algorithm 1. Default 1 with warm_start and 5 without.
        oversampling: p of Algorithm 1, the columns of a sketch beyond k; with ``warm_start`` they
            are its fresh ones, of which the test sketch has four times as many. Default 2.
        scope: what one factorisation spans under ZeRO: "partition", the rows that a rank holds,
            without communication; or "matrix", the whole matrix, by sums over the ranks that ZeRO
            cut it for. Results then do not depend on the number of ranks
            (docs/how-it-works.md#one-factorisation-on-all-ranks). As configured: no checkpoint
            changes it. Default "partition".
        right_factor: with the scope "matrix", where the right factor U of a cut matrix is kept:
            "sharded", rows of it on each rank that holds some of the matrix, gathered in a step,
            least memory; or "replicated", all of it, so that DeepSpeed's functions can read
            ``exp_avg_sq``. As configured, too. Default "sharded" there.
        clip_threshold: d, the largest root mean square of G / sqrt(V), beyond which an update is
            scaled down; ``inf`` for no clipping, which leaves AdamW's learning rates right. Set 1
            if a run diverges early that a longer warm-up does not save. Default inf with a
            momentum of gradients, else 1.
        seed: of the random sketches, which leave the model's own random stream untouched.
            Default 0.
        preset: "paper" for all of the paper's settings (lr 3e-4 and weight decay 0.1 among them);
            arguments given explicitly win.
        maximize: ascend instead of descend. Default False.
        nonfinite: what NaN, infinite and too large (beyond 1.8e19) gradients do: "raise" an error
            that names them, "skip" the step (:attr:`skipped` counts), both before they touch a
            weight or moment; or "propagate", unchecked. The strictest of the groups stepped
            together holds (docs/faults.md). Default what the DeepSpeed config asks for:
            "propagate" by ``"bf16": {"check_grad_overflow": false}``, else "raise".

    Attributes:
        skipped: steps left out in this process because of such gradients.

    Raises:
        ValueError, TypeError: names the argument, its value and what is allowed.
    """

    shards: MatrixTable
    shards_class = MatrixTable
    settings_class = Hyperparameters
    refusals = REFUSALS
    loads_dense_moments = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        rank_policy: str | None = None,
        rank_interval: int | None = None,
        rank_init: int | None = None,
        rank_min: int | None = None,
        rank_max: int | None = None,
        rank_step: int | None = None,
        rank_beta: float | None = None,
        error_threshold: float | None = None,
        factor_dtype: str | None = None,
        warm_start: bool | None = None,
        momentum: str | None = None,
        nesterov: bool | None = None,
        floor: float | None = None,
        first_moment: str | None = None,
        weight_rounding: str | None = None,
        guidance: str | None = None,
        bias_correction: bool | None = None,
        power_iterations: int | None = None,
        oversampling: int | None = None,
        scope: str | None = None,
        right_factor: str | None = None,
        clip_threshold: float | None = None,
        seed: int | None = None,
        preset: str | None = None,
        maximize: bool | None = None,
        nonfinite: str | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__(params, locals(), partial(resolve, preset))

    def _require_loadable(self, group: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        if "momentum" not in group and not before["warm_start"]:
            raise ValueError(
                "Adapprox: with warm_start=False the first moment is a mean of updates, and in "
                "a state that another optimizer saved it is one of gradients. Go through a "
                "universal checkpoint, which adapprox_ds.load_universal converts"
            )

    def _complete_group(self, group: dict[str, Any], before: Mapping[str, Any]) -> None:
        if "momentum" not in group and before["momentum"] != "gradient":
            _log.warning(
                "Adapprox: momentum=%r becomes 'gradient' in a group whose state was loaded "
                "from another optimizer, which averages gradients",
                before["momentum"],
            )
            group["momentum"] = "gradient"
        super()._complete_group(group, before)
        # The layout's, which a checkpoint does not change.
        group["scope"], group["right_factor"] = before["scope"], before["right_factor"]

    def _is_ready(self, state: dict[str, Any]) -> bool:
        return isinstance(state.get(SECOND_MOMENT), LowRankMoment)

    def _make_ready(self, p: Tensor, settings: Hyperparameters) -> None:
        make_ready(self.state[p], p, self.shards.layouts[p], settings)

    def metrics(self, *, synchronize: bool = False) -> Metrics:
        """Ranks, error ratios and state bytes of what this process holds.

        Args:
            synchronize: on an accelerator, wait for the last step's error ratios; otherwise the
                ones of the step before are reported and the device is not waited for.
        """
        return collect(self._held(), synchronize, self.skipped)

    def _settings_in_force(self, group: dict[str, Any]) -> Hyperparameters:
        h = Hyperparameters.of_group(group)
        group["betas_seen"] = h.seeing()
        return replace(h, betas_seen=group["betas_seen"])

    def _check_kernels(self, groups: list[tuple[list[Tensor], Hyperparameters]]) -> None:
        work = []
        for p, h in self._all_at_hand(groups):
            flat = _Flat(p, self.state[p], self.shards.layouts[p], h)
            work.append((h, flat.fragments, flat.t))
        check_passes(work)

    def _step_groups(self, groups: list[tuple[list[Tensor], Hyperparameters]]) -> None:
        """One step, which writes nothing unless all gradients are finite (``nonfinite``)."""
        work = [
            (h, [_Flat(p, self.state[p], self.shards.layouts[p], h) for p in params])
            for params, h in groups
        ]
        modes = self.shards.nonfinite(h.nonfinite for h, flats in work if flats)
        fragments = [f for _, flats in work for flat in flats for f in flat.fragments]
        check = None
        if modes - {"propagate"}:
            check = GradientCheck.start(fragments, self.shards.norm(), self.shards.agree)
        with self._left_out(modes, fragments):
            if check is not None and check.ready is None:
                check.require()
            for h, flats in work:
                self._step_flats(flats, h, check)

    def _step_flats(
        self, flats: list[_Flat], h: Hyperparameters, check: GradientCheck | None
    ) -> None:
        """One step for flat tensors that have the same settings."""
        alike: dict[tuple[Any, ...], list[Fragment]] = defaultdict(list)
        for flat in flats:
            own = self.shards.uncut(flat.p, flat.fragments)
            kinds = (flat.p.dtype, flat.grad_dtype, flat.store.dense.dtype)
            alike[(flat.t, flat.p.device, *kinds)].extend(own)
        for (t, *_), fragments in alike.items():
            if h.warm_start:
                update(fragments, t, h, check)
        for flat in flats:
            if h.warm_start and (peers := self.shards.peers.get(flat.p)):
                update_together(flat.fragments, peers, flat.store.dense, flat.t, h, check)
        if check is not None:
            check.require()
        for flat in flats:
            if not h.warm_start:
                for fragment in flat.fragments:
                    literal.update(fragment, flat.t, h)
            flat.finish(h)


class _Flat:
    """One flat tensor that a step updates, seen as fragments."""

    def __init__(
        self, p: Tensor, state: dict[str, Any], layout: ShardLayout, h: Hyperparameters
    ) -> None:
        # Where none is at hand kernels are chosen alone, for one like the weights.
        grad = p if p.grad is None else p.grad
        self.p, self.state = p, state
        self.store = make_ready(state, p, layout, h)
        self.store.settle()  # the last step's error ratios set the ranks
        self.t = int(state[STEP]) + 1
        dense = iter(
            self.store.dense.split([run.numel for run in layout.runs]) if layout.runs else ()
        )
        factors = iter(self.store.factors)
        self.weights, grads, self.grad_dtype = as_flat(p), as_flat(grad), grad.dtype
        lost = state.get(COMPENSATION)
        means: Iterable[Any] = repeat(None)
        if FIRST_MOMENT in state:
            means = first_moment_pieces(state[FIRST_MOMENT], layout)
        self.fragments = []
        for part, mean in zip(layout.fragments, means, strict=False):
            here = part.elements
            self.fragments.append(
                Fragment(
                    part,
                    self.weights[here],
                    mean,
                    grads[here],
                    list(islice(dense, len(part.runs))),
                    None if part.block is None else next(factors),
                    None if lost is None else lost.view(-1)[here],
                )
            )

    def finish(self, h: Hyperparameters) -> None:
        """Count the step, and send the error ratios on their way."""
        write_back(self.p, self.weights)
        if errors := [error for f in self.fragments for error in f.errors]:
            self.store.pending = PendingErrors.start(errors, h.rank_control, self.t)
        # A new tensor: DeepSpeed's stock universal loader gives all sub-groups the same one.
        self.state[STEP] = torch.full_like(self.state[STEP], self.t)
