# SPDX-License-Identifier: Apache-2.0
"""Adapprox: Adam with decoupled weight decay and a second moment of adaptive rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock, FactorStore, PendingErrors
from adapprox_ds.lowrank.moment import LowRankMoment
from adapprox_ds.lowrank.rank import rank_in_use
from adapprox_ds.lowrank.srsi import error_ratio, gaussian_sketch, sketch_width, srsi
from adapprox_ds.optim.hyperparameters import (
    FIELD_NAMES,
    Hyperparameters,
    as_group_defaults,
    refuse_unknown,
    resolve,
)
from adapprox_ds.optim.metrics import Metrics, collect
from adapprox_ds.optim.shards import ShardTable
from adapprox_ds.optim.state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    factor_dense,
    new_state,
    require_match,
)
from adapprox_ds.zero.layout import FragmentLayout, MatrixBlock, ShardLayout


class Adapprox(torch.optim.Optimizer):
    """Algorithm 3 of the paper, on parameters of any shape and on DeepSpeed's flat ZeRO shards.

    Each parameter of two or more dimensions is treated as its most nearly square matrix; its
    second moment is kept as Q U^T with a rank that adapts to the approximation error. Vectors,
    matrices too small to gain and rows cut by a ZeRO partition keep a dense second moment.

    Args:
        params: parameters, named parameters, or parameter groups; every argument below can be
            overridden in a group.
        lr: learning rate, float or one-element tensor. Default 1e-3.
        betas: decay of the first and second moment. Default (0.9, 0.999).
        eps: added to the root of the second moment. Default 1e-8.
        weight_decay: decoupled weight decay. Default 1e-2.
        rank_init: initial rank k_0. Default ``rank_max``.
        rank_min: k_min. Default 1.
        rank_max: k_max. Default 256.
        rank_step: delta k. Default max(ceil(0.02 rank_max), 1).
        rank_beta: beta_3, decay of the rank moment. Default 0.9.
        error_threshold: xi_thresh. Default 1e-3.
        power_iterations: l of S-RSI. Default 5.
        oversampling: p of S-RSI. Default 5.
        clip_threshold: largest root mean square of an update; ``inf`` for none. Default 1.
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
        rank_init: int | None = None,
        rank_min: int | None = None,
        rank_max: int | None = None,
        rank_step: int | None = None,
        rank_beta: float | None = None,
        error_threshold: float | None = None,
        power_iterations: int | None = None,
        oversampling: int | None = None,
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
        given = {name: param_group[name] for name in FIELD_NAMES if name in param_group}
        inherited = dict(self.defaults)
        if "rank_max" in given:
            inherited["rank_init"] = inherited["rank_step"] = None
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
            for name in FIELD_NAMES:
                group.setdefault(name, getattr(settings, name))

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
            for p in group["params"]:
                if p.grad is not None:
                    self._step_flat(p, h)
        return loss

    def init_state(self, *, lazily: bool = False) -> None:
        """Allocate the state of everything that has none, as the first step would.

        DeepSpeed links all groups' states after the first group's step, so shards' states are
        created together (runtime/zero/stage_1_and_2.py, _lazy_init_hp_params_optimizer_state).

        Args:
            lazily: for ZeRO shards only; other parameters get theirs with their first gradient.
        """
        for p, h in self.shards.settings_by_shard():
            if not self.state[p]:
                self.state[p].update(new_state(p, self.shards.layouts[p], h))
        if lazily:
            return
        for group in self.param_groups:
            h = Hyperparameters.of_group(group)
            self.shards.locate(group["params"])
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(new_state(p, self.shards.layouts[p], h))

    def metrics(self, *, synchronize: bool = False) -> Metrics:
        """Ranks, error ratios and state bytes of what this process holds.

        Args:
            synchronize: on an accelerator, wait for the last step's error ratios; otherwise the
                ones of the step before are reported and the device is not waited for.
        """
        held = ((p, self.shards.layouts[p], s) for p, s in self.state.items() if s)
        return collect(held, synchronize)

    def _step_flat(self, p: Tensor, h: Hyperparameters) -> None:
        """Algorithm 3 for one parameter or shard ``p``, fragment by fragment."""
        if p.grad.is_sparse:  # type: ignore[union-attr]
            raise RuntimeError(
                "Adapprox: sparse gradients are not supported; build the embedding with "
                "sparse=False and leave sparse_gradients out of the DeepSpeed config"
            )
        layout, state = self.shards.layouts[p], self.state[p]
        if not state:
            state.update(new_state(p, layout, h))
        t = int(state[STEP]) + 1
        store = self._factors(state, layout, h, t - 1)
        dense = iter(store.dense.split([run.numel for run in layout.runs]))
        factors = iter(store.blocks)
        weights, grads = p.detach().reshape(-1), p.grad.reshape(-1)  # type: ignore[union-attr]
        first = state[FIRST_MOMENT].view(-1) if FIRST_MOMENT in state else None
        errors: list[Tensor] = []
        for part in layout.fragments:
            span = slice(part.fragment.offset, part.fragment.offset + part.fragment.numel)
            g = grads[span].to(store.dense.dtype)
            x = self._normalized(part, -g if h.maximize else g, dense, factors, errors, t, h)
            rms = torch.linalg.vector_norm(x) / math.sqrt(x.numel())
            x.div_((rms / h.clip_threshold).clamp_(min=1.0))  # line 9, the clipping mechanism
            if first is not None:  # lines 10-12
                m = first[span]
                x = m.to(x.dtype).lerp(x, 1.0 - h.betas[0])
                m.copy_(x)
            w, lr = weights[span], h.learning_rate
            w.copy_(w.to(x.dtype).mul(1.0 - lr * h.weight_decay).sub_(x, alpha=lr))  # line 13
        if weights.data_ptr() != p.data_ptr():
            p.copy_(weights.view(p.shape))
        if errors:
            store.pending = PendingErrors.start(torch.stack(errors), h.rank_policy)
        # A new tensor: DeepSpeed's stock universal loader gives all sub-groups the same one.
        state[STEP] = torch.full_like(state[STEP], t)

    def _normalized(
        self,
        part: FragmentLayout,
        g: Tensor,
        dense: Iterator[Tensor],
        factors: Iterator[FactoredBlock],
        errors: list[Tensor],
        t: int,
        h: Hyperparameters,
    ) -> Tensor:
        """G / (sqrt(V) + eps) of one fragment (lines 4-8), its second moment updated on the way.

        Args:
            part: the fragment and its pieces.
            g: (fragment numel,) gradient in the compute dtype.
            dense: second moments of the remaining dense runs; advanced by this fragment's.
            factors: factors of the remaining blocks; advanced by this fragment's.
            errors: receives the error ratio of each block.
            t: the step, 1 at the first.
            h: the group's settings.

        Returns:
            (fragment numel,) update before clipping.
        """
        beta2 = h.betas[1]
        x = torch.empty_like(g)
        start = part.fragment.offset
        for run in part.runs:
            here = slice(run.offset - start, run.offset - start + run.numel)
            v = next(dense).mul_(beta2).addcmul_(g[here], g[here], value=1.0 - beta2)
            torch.div(g[here], v.sqrt().add_(h.eps), out=x[here])
        for block in part.blocks:
            here = slice(block.offset - start, block.offset - start + block.numel)
            gm, xm = g[here].view(block.rows, block.cols), x[here].view(block.rows, block.cols)
            f = next(factors)
            v = f.reconstruct("variance").mul_(beta2).addcmul_(gm, gm, value=1.0 - beta2)  # line 5
            torch.div(gm, v.sqrt().add_(h.eps), out=xm)  # line 8: V, not its compression
            errors.append(self._compress(v, f, block, t, h))  # lines 6-7
        return x

    def _compress(
        self, v: Tensor, f: FactoredBlock, block: MatrixBlock, t: int, h: Hyperparameters
    ) -> Tensor:
        """Algorithm 2: factor V_t with the rank in force; the error ratio sets the next rank."""
        k = rank_in_use(f.rank)
        width = sketch_width(k, h.oversampling, block.rows, block.cols)
        sketch = gaussian_sketch(h.seed, block.name, block.first_row, t, (block.cols, width), v)
        f.q, f.u = srsi(v, k, sketch, h.power_iterations)
        return error_ratio(v, f.q, f.u)

    def _factors(
        self, state: dict[str, Any], layout: ShardLayout, h: Hyperparameters, done: int
    ) -> FactorStore:
        """The second moment's factors, with the ranks that the last step's errors ask for."""
        moment = state[SECOND_MOMENT]
        if not isinstance(moment, LowRankMoment):
            moment = state[SECOND_MOMENT] = factor_dense(moment, layout, h, done)
        require_match(moment, layout)
        moment.store.settle()
        return moment.store
