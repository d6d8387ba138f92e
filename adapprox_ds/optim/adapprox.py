# SPDX-License-Identifier: Apache-2.0
"""Adapprox: Adam with decoupled weight decay and a second moment of adaptive rank."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import PendingErrors
from adapprox_ds.lowrank.moment import LowRankMoment
from adapprox_ds.optim import literal, tracking
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import (
    FIELD_NAMES,
    Hyperparameters,
    as_group_defaults,
    resolve,
)
from adapprox_ds.optim.matrix_scope import MatrixStep
from adapprox_ds.optim.metrics import Metrics, collect
from adapprox_ds.optim.refusals import refuse_in_group, refuse_unknown
from adapprox_ds.optim.shards import ShardTable
from adapprox_ds.optim.state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    first_moment_pieces,
    make_ready,
)
from adapprox_ds.zero.layout import ShardLayout

_log = logging.getLogger(__name__)


class Adapprox(torch.optim.Optimizer):
    """Adapprox on parameters of any shape and on DeepSpeed's flat ZeRO shards.

    Each parameter of two or more dimensions is treated as its most nearly square matrix; its
    second moment is kept in factors of a rank that adapts to the approximation error. Vectors,
    matrices too small to gain and rows cut by a ZeRO partition keep a dense second moment. By
    default the factors are of the second moment's root and follow it in two tiled passes
    (:mod:`adapprox_ds.optim.tracking`); ``preset="paper"`` is Algorithm 3 as it is written
    (:mod:`adapprox_ds.optim.literal`).

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
        warm_start: follow the last factors in two passes instead of starting cold. Default True.
        balanced: weigh rows and columns by one over their root mean square. Default
            ``warm_start``.
        floor: least second moment at use, relative to r c^T / mean of its row and column means.
            Default 0.1 with ``warm_start`` and a momentum of gradients, else 0.
        momentum: the first moment is the mean of "gradient", as in Adam, or of "update", as in the
            paper. Default "gradient".
        nesterov: apply the first moment as it will be if the gradient repeats. Default True.
        first_moment: how it is kept: "fp32", "bf16", "int8" (1.03 bytes an element), or "none"
            with beta_1 = 0. Default "fp32".
        guidance: "cosine" lets an update go by half to double its length, as it agrees with the
            first moment. Default "none".
        bias_correction: Adam's, of both moments. Default True.
        power_iterations: l of S-RSI. Default 1 with ``warm_start``, else 5.
        oversampling: p of S-RSI. Default 5.
        scope: what one factorisation spans under ZeRO: the rows of a "partition", or the whole
            "matrix", by sums over the ranks. Default "partition".
        clip_threshold: root mean square of G / sqrt(V) beyond which an update is scaled down;
            ``inf`` for never. Default ``inf`` with a momentum of gradients, else 1.
        seed: of the random sketches. Default 0.
        preset: "paper" for all of the paper's settings (lr 3e-4 and weight decay 0.1 among them);
            arguments given explicitly win.
        maximize: ascend instead of descend.

    Raises:
        ValueError, TypeError: names the argument, its value and what is allowed.
    """

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
        guidance: str | None = None,
        bias_correction: bool | None = None,
        power_iterations: int | None = None,
        oversampling: int | None = None,
        scope: str | None = None,
        clip_threshold: float | None = None,
        seed: int | None = None,
        preset: str | None = None,
        maximize: bool | None = None,
        **unsupported: Any,
    ) -> None:
        refuse_unknown(unsupported)
        arguments = locals()
        settings = resolve(preset, {name: arguments[name] for name in FIELD_NAMES})
        self.shards = ShardTable()
        super().__init__(params, as_group_defaults(settings))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyper-parameters are validated like the constructor's."""
        refuse_in_group(param_group)
        given = {name: param_group[name] for name in FIELD_NAMES if name in param_group}
        inherited = dict(self.defaults)
        # What the constructor derived from a setting is derived anew where a group has another.
        if "rank_max" in given:
            inherited["rank_init"] = inherited["rank_step"] = None
        if "rank_policy" in given:
            inherited["rank_init"] = None
        if "warm_start" in given:
            inherited["balanced"] = inherited["power_iterations"] = None
        if "warm_start" in given or "momentum" in given:
            inherited["floor"] = None
        if "momentum" in given:
            inherited["clip_threshold"] = None
        settings = Hyperparameters(**{**inherited, **given})
        super().add_param_group({**param_group, **as_group_defaults(settings)})
        self.shards.record_group(self.param_groups[-1], settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "shards" not in self.__dict__:
            self.shards = ShardTable()
            for group in self.param_groups:
                self.shards.record_group(group, Hyperparameters.of_group(group))
        for group, settings in zip(self.param_groups, self.shards.settings, strict=False):
            if "momentum" not in group and settings.momentum != "gradient":
                _log.warning(
                    "Adapprox: momentum=%r becomes 'gradient' in a group whose state was loaded "
                    "from another optimizer, which averages gradients",
                    settings.momentum,
                )
                group["momentum"] = "gradient"
            for name in FIELD_NAMES:
                group.setdefault(name, getattr(settings, name))
            group["scope"] = settings.scope  # the layout's, which a checkpoint does not change

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter or shard that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: sparse gradients; a shard whose parameters cannot be found.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.shards.locate(active)
        if self.shards.is_dummy_step(active, self.state):
            return loss
        self.init_state(lazily=True)
        for group in self.param_groups:
            h = Hyperparameters.of_group(group)
            self._step_group([p for p in group["params"] if p.grad is not None], h)
        return loss

    def init_state(self, *, lazily: bool = False) -> None:
        """Allocate the state of everything that has none, as the first step would.

        DeepSpeed links all groups' states after the first group's step, so shards' states are
        created together (runtime/zero/stage_1_and_2.py, _lazy_init_hp_params_optimizer_state).

        Args:
            lazily: for ZeRO shards only; other parameters get theirs with their first gradient.
        """
        for p, h in self.shards.settings_by_shard():
            if not isinstance(self.state[p].get(SECOND_MOMENT), LowRankMoment):
                make_ready(self.state[p], p, self.shards.layouts[p], h)
        if lazily:
            return
        for group in self.param_groups:
            h = Hyperparameters.of_group(group)
            self.shards.locate(group["params"])
            for p in group["params"]:
                make_ready(self.state[p], p, self.shards.layouts[p], h)

    def metrics(self, *, synchronize: bool = False) -> Metrics:
        """Ranks, error ratios and state bytes of what this process holds.

        Args:
            synchronize: on an accelerator, wait for the last step's error ratios; otherwise the
                ones of the step before are reported and the device is not waited for.
        """
        states = {p: s for p, s in self.state.items() if s}
        self.shards.locate_own(states)
        layouts = self.shards.layouts
        held = ((p, layouts[p], s) for p, s in states.items() if p in layouts)
        return collect(held, synchronize)

    def _step_group(self, params: list[Tensor], h: Hyperparameters) -> None:
        """One step for parameters or shards that have the same settings."""
        flats = [_Flat(p, self.state[p], self.shards.layouts[p], h) for p in params]
        if h.warm_start:
            shared = [
                MatrixStep(flat.fragments, peers, flat.store.dense, flat.t, h)
                for flat in flats
                if (peers := self.shards.peers.get(flat.p))
            ]
            for step in shared:
                step.start()
            alike: dict[tuple[int, Any, Any], list[Fragment]] = defaultdict(list)
            for flat in flats:
                own = self.shards.uncut(flat.p, flat.fragments)
                alike[flat.t, flat.p.device, flat.store.dense.dtype].extend(own)
            for (t, *_), fragments in alike.items():
                tracking.update(fragments, t, h)
            for step in shared:
                step.finish()
        else:
            for flat in flats:
                for fragment in flat.fragments:
                    literal.update(fragment, flat.t, h)
        for flat in flats:
            flat.finish(h)


class _Flat:
    """One flat tensor that a step updates, seen as fragments."""

    def __init__(
        self, p: Tensor, state: dict[str, Any], layout: ShardLayout, h: Hyperparameters
    ) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                "Adapprox: sparse gradients are not supported; build the embedding with "
                "sparse=False and leave sparse_gradients out of the DeepSpeed config"
            )
        self.p, self.state = p, state
        self.store = make_ready(state, p, layout, h)
        self.store.settle()  # the last step's error ratios set the ranks
        self.t = int(state[STEP]) + 1
        dense = iter(self.store.dense.split([run.numel for run in layout.runs]))
        blocks = iter(self.store.blocks)
        self.weights, grads = p.detach().reshape(-1), grad.reshape(-1)
        means: Iterable[Any] = repeat(None)
        if FIRST_MOMENT in state:
            means = first_moment_pieces(state[FIRST_MOMENT], layout)
        self.fragments = []
        for part, mean in zip(layout.fragments, means, strict=False):
            span = slice(part.fragment.offset, part.fragment.offset + part.fragment.numel)
            self.fragments.append(
                Fragment(
                    part,
                    self.weights[span],
                    mean,
                    grads[span],
                    list(islice(dense, len(part.runs))),
                    list(islice(blocks, len(part.blocks))),
                )
            )

    def finish(self, h: Hyperparameters) -> None:
        """Count the step, and send the error ratios on their way."""
        if self.weights.data_ptr() != self.p.data_ptr():
            self.p.detach().copy_(self.weights.view(self.p.shape))
        if errors := [error for f in self.fragments for error in f.errors]:
            self.store.pending = PendingErrors.start(errors, h.rank_control, self.t)
        # A new tensor: DeepSpeed's stock universal loader gives all sub-groups the same one.
        self.state[STEP] = torch.full_like(self.state[STEP], self.t)
