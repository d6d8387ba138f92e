# SPDX-License-Identifier: Apache-2.0
"""Adapprox: Adam with decoupled weight decay and a second moment of adaptive rank."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox import literal
from adapprox_ds.adapprox.factors import PendingErrors
from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import FIELD_NAMES, REFUSALS, Hyperparameters
from adapprox_ds.adapprox.metrics import Metrics, collect
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.presets import as_defaults, resolve
from adapprox_ds.adapprox.settling import check_passes
from adapprox_ds.adapprox.shards import MatrixTable
from adapprox_ds.adapprox.state import first_moment_pieces, make_ready
from adapprox_ds.adapprox.step import update, update_together
from adapprox_ds.core.base import ShardOptimizer, add_group
from adapprox_ds.core.inputs import as_flat, write_back
from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.core.nonfinite import GradientCheck, NonfiniteGradientError, describe
from adapprox_ds.core.state import COMPENSATION, FIRST_MOMENT, SECOND_MOMENT, STEP

_log = logging.getLogger(__name__)


class Adapprox(ShardOptimizer):
    """Adapprox on parameters of any shape and on DeepSpeed's flat ZeRO shards.

    Each parameter of two or more dimensions is treated as its most nearly square matrix; its
    second moment is kept in factors of a rank that adapts to the approximation error. Vectors,
    matrices too small to gain and rows cut by a ZeRO partition keep a dense second moment. By
    default the factors are of the second moment's root and follow it in one tiled pass
    (:mod:`adapprox_ds.adapprox.step`); ``preset="paper"`` is Algorithm 3 as it is written
    (:mod:`adapprox_ds.adapprox.literal`).

    Args:
        params: parameters, named parameters, or parameter groups; every argument below can be
            overridden in a group.
        lr: learning rate, float or one-element tensor. Default 1e-3.
        betas: decay of the first and second moment. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled weight decay. Default 1e-2.
        rank_policy: how ranks adapt: "reflect" (Algorithm 2), or "expand", from a small start
            (the paper's first version). Default "reflect".
        rank_interval: steps after which "expand" tries smaller ranks again. Default 10.
        rank_init: initial rank k_0. Default ``rank_max``, ``rank_min`` with "expand".
        rank_min: k_min. Default 1.
        rank_max: k_max. Default 8.
        rank_step: delta k. Default max(ceil(0.02 rank_max), 1).
        rank_beta: beta_3, decay of the rank moment. Default 0.9.
        error_threshold: xi_thresh, the error ratio above which a rank rises. Default 1e-3.
        factor: what is factored, the second moment's root "std" or the second moment "variance".
            Default "std".
        factor_dtype: what factors are kept in, "fp32" or "bf16". Default "fp32".
        warm_start: follow the last factors in one pass instead of starting cold. Default True.
        balanced: weigh rows and columns by one over their root mean square. Default
            ``warm_start``.
        floor: least second moment at use, relative to r c^T / mean of its row and column means.
            Default 0.1 with ``warm_start`` and a momentum of gradients, else 0.
        momentum: the first moment is the mean of "gradient", as in Adam, or of "update", as in the
            paper. Default "gradient".
        nesterov: apply the first moment as it will be if the gradient repeats. Default True.
        first_moment: how it is kept: "fp32", "bf16", "int8" (1.03 bytes an element), "int4" (0.53
            bytes), or "none" with beta_1 = 0. Default "fp32".
        weight_rounding: how weights in bf16 or fp16 are written: "stochastic", at random;
            "compensated", with one more byte an element in the state for what is lost; or
            "nearest". Default "stochastic".
        guidance: "cosine" lets an update go by half to double its length, as it agrees with the
            first moment. Default "none".
        bias_correction: Adam's, of both moments. Default True.
        power_iterations: l of S-RSI. Default 1 with ``warm_start``, else 5.
        oversampling: p of S-RSI. Default 2.
        scope: what one factorisation spans under ZeRO: the rows of a "partition", or the whole
            "matrix", by sums over the ranks. Default "partition".
        right_factor: with the scope "matrix", the right factor of a cut matrix is "sharded" over
            the ranks that hold it, or "replicated" on them. Default "sharded" there.
        clip_threshold: root mean square of G / sqrt(V) beyond which an update is scaled down;
            ``inf`` for never. Default ``inf`` with a momentum of gradients, else 1.
        seed: of the random sketches. Default 0.
        preset: "paper" for all of the paper's settings (lr 3e-4 and weight decay 0.1 among them);
            arguments given explicitly win.
        maximize: ascend instead of descend.
        nonfinite: on NaN, infinite or too large gradients, "raise" an error that names them,
            "skip" the step (:attr:`skipped` counts), or "propagate" them, unchecked. The
            strictest of the groups stepped together holds. Default "raise", "propagate" where the
            DeepSpeed config says ``"bf16": {"check_grad_overflow": false}``.

    Attributes:
        skipped: steps left out in this process because of such gradients.

    Raises:
        ValueError, TypeError: names the argument, its value and what is allowed.
    """

    shards: MatrixTable
    shards_class = MatrixTable
    settings_class = Hyperparameters
    field_names = FIELD_NAMES
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
        factor: str | None = None,
        factor_dtype: str | None = None,
        warm_start: bool | None = None,
        balanced: bool | None = None,
        floor: float | None = None,
        momentum: str | None = None,
        nesterov: bool | None = None,
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
        REFUSALS.unknown(unsupported)
        arguments = locals()
        given = {name: arguments[name] for name in FIELD_NAMES}
        settings = resolve(preset, given)
        self.shards, self.skipped = MatrixTable("Adapprox"), 0
        super().__init__(params, as_defaults(settings, given))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyper-parameters are validated like the constructor's."""
        REFUSALS.in_group(param_group)
        settings = Hyperparameters.of_group({**self.defaults, **param_group})
        add_group(
            self,
            param_group,
            settings.as_group(),
            lambda group: self.shards.record_group(group, settings),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped", 0)

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
        try:
            if check is not None and check.ready is None:
                check.require()
            for h, flats in work:
                self._step_flats(flats, h, check)
        except NonfiniteGradientError:
            self.skipped += 1
            if "raise" in modes:
                raise NonfiniteGradientError(describe("Adapprox", fragments)) from None

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
