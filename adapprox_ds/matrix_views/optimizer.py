# SPDX-License-Identifier: Apache-2.0
"""MatrixViews: wraps an optimizer of matrices, such as Muon, so that it can step ZeRO's shards.

The wrapped optimizer gets matrices that are views of the flat shard, instead of the shard itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.base import add_group
from adapprox_ds.core.layout import SCOPES
from adapprox_ds.core.refusals import refuse_sparse
from adapprox_ds.matrix_views.gather import Exchange, cut_whole
from adapprox_ds.matrix_views.table import ViewTable, settings_of
from adapprox_ds.matrix_views.unit import MATRICES, VECTORS, Piece, Role, Unit, cut, differs

#: The keys of a group that are no settings of the wrapped class.
_NOT_SETTINGS = ("params", "param_names", VECTORS)


class MatrixViews(torch.optim.Optimizer):
    """Lets an optimizer class step matrices where ZeRO keeps one flat tensor.

    For each parameter in a shard, its whole rows become one matrix that is a view of the shard;
    rows that the partition cuts, and parameters of one dimension, become vectors. An instance of
    the class steps them. Without ZeRO the class gets the parameters themselves, those of more than
    two dimensions as their most nearly square 2-D view.

    There is one instance for each shard, or, without ZeRO, one for all parameters. So a class that
    counts its calls counts steps. The instances' settings follow this optimizer's ``param_groups``,
    which schedulers change. ``state[tensor]["pieces"]`` has the state of the class, which DeepSpeed
    saves, and loads at the same stage and number of processes.

    Args:
        optimizer_cls: the class, a subclass of ``torch.optim.Optimizer``.
        params: parameters, named parameters or parameter groups. Settings of a group that differ
            from the constructor's are for both classes. ``"vectors": True`` gives the group's
            matrices to the class for vectors too (for embeddings with Muon).
        vectors: a class for vectors; by default ``optimizer_cls``.
        vectors_args: the arguments of that class. If they have a learning rate, it changes in
            proportion to the group's; otherwise it is the group's.
        scope: what the class gets of a parameter that ZeRO's partition cuts. "partition": each
            process steps its own rows. "matrix": one of the processes that have a part of the
            parameter steps all of it, so that the result does not depend on the partition. The
            other parts of its weights and gradient are sent there, and the new weights back, in
            each step; its state lies on that process alone. Parameters of groups with
            ``"vectors": True`` are not gathered.
        **args: the arguments of ``optimizer_cls``.

    Raises:
        TypeError: a class is no optimizer class.
        ValueError: ``vectors_args`` or a group's ``"vectors"`` without ``vectors``; ``lr=0`` with a
            learning rate in ``vectors_args``; an unknown ``scope``; or parameters that are not
            floating point.
        Exception: whatever a class raises for its arguments.
    """

    #: Whether a step can begin with dense moments, as DeepSpeed's universal loader makes them.
    loads_dense_moments = False

    def __init__(
        self,
        optimizer_cls: type[torch.optim.Optimizer],
        params: Any,
        *,
        vectors: type[torch.optim.Optimizer] | None = None,
        vectors_args: Mapping[str, Any] | None = None,
        scope: str = "partition",
        **args: Any,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"MatrixViews: scope={scope!r} is not allowed; allowed: {SCOPES}")
        self._scope = scope
        params = list(params)
        settings = [_settings(group) for group in params if isinstance(group, dict)] or [{}]
        self._roles = {MATRICES: Role.of(optimizer_cls, args, settings, "optimizer_cls")}
        if vectors is not None:
            self._roles[VECTORS] = Role.of(vectors, vectors_args or {}, [{}], "vectors")
        elif vectors_args is not None:
            raise ValueError("MatrixViews: vectors_args is given without vectors, its class")
        defaults = dict(self._roles[MATRICES].defaults)
        if "lr" in (vectors_args or {}) and defaults.get("lr") == 0:
            raise ValueError(
                "MatrixViews: lr=0 with a learning rate in vectors_args, which follows it in "
                "proportion; allowed: lr > 0 (a scheduler may lower it)"
            )
        self.shards = ViewTable()
        self._units: dict[Tensor | None, Unit] = {}
        self._exchanges: dict[Tensor, Exchange] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which can have ``"vectors": True``."""
        chosen = param_group.get(VECTORS, False)
        if not isinstance(chosen, bool) or (chosen and VECTORS not in self._roles):
            raise ValueError(
                f"MatrixViews: {VECTORS!r}: {chosen!r} in a parameter group is not allowed; "
                "allowed: False, and with a class for vectors True"
            )
        add_group(self, param_group, {}, self._record)
        self.forget_units()

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that copies and pickles keep; the others are derived from them."""
        return {**super().__getstate__(), "_roles": self._roles, "_scope": self._scope}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "shards" not in self.__dict__:
            self.__dict__.setdefault("_scope", "partition")
            self.shards = ViewTable()
            for group in self.param_groups:
                self._record(group)
            self._units, self._exchanges = {}, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped class's instances for every parameter or shard that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; it is called once.

        Raises:
            RuntimeError: a gradient is sparse, the parameters of a shard cannot be found, or a
                loaded state is of another partition, class or optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in active:
            refuse_sparse("MatrixViews", p.grad)
        self.shards.locate(active)
        for p in filter(self.shards.is_frozen, active):
            p.grad = None  # DeepSpeed gives it zeros; the wrapped class should not step it
        if self.shards.is_dummy_step(active, self.state):
            return loss
        whole = any(self.shards.is_whole(p) for p in active)
        if whole:
            members = [[p for p in g["params"] if self._is_known(p)] for g in self.param_groups]
            self._step_together(None, members, self.param_groups)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.shards.is_whole(p):
                    self._step_together(p, [[p]], [group])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; the next step gives it to the ``load_state_dict`` of the classes."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                self.state[p] = state_dict["state"][index]
        self.forget_units()

    def _record(self, group: Mapping[str, Any]) -> None:
        self.shards.record_group(group, settings_of(group, self._scope))

    def forget_units(self) -> None:
        """Let the next step make new instances of the classes, from the state that it finds."""
        self._units.clear()
        self._exchanges.clear()

    @property
    def classes(self) -> dict[str, str]:
        """The names of the classes by role: ``MATRICES``, and ``VECTORS`` where one was given."""
        return {name: role.cls.__name__ for name, role in self._roles.items()}

    def pieces_of(self, p: Tensor) -> list[Piece]:
        """Split a parameter or shard of known layout into new pieces."""
        if sharing := self.shards.sharing.get(p):
            return cut_whole(p, self.shards.layouts[p], sharing)
        return cut(p, self.shards.layouts[p], self.shards.is_whole(p))

    def _is_known(self, p: Tensor) -> bool:
        """Whether a tensor is a whole parameter; notes its layout if so."""
        self.shards.locate_own([p])
        return self.shards.is_whole(p)

    def _step_together(
        self,
        key: Tensor | None,
        tensors: Sequence[Sequence[Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Step one shard, or all whole parameters.

        Args:
            key: the shard; None for the whole parameters.
            tensors: for each group the tensors to step.
            groups: the parameter groups of this optimizer that they are in.
        """
        options = [self._options(group) for group in groups]
        pieces = None
        if key not in self._units:
            pieces = {p: self.pieces_of(p) for members in tensors for p in members}
        with self._gathered(key, pieces):
            if pieces is not None:
                only_vectors = [bool(group.get(VECTORS)) for group in groups]
                scope = self._scope if key is not None else "partition"
                self._units[key] = Unit(
                    tensors, pieces, self._roles, options, only_vectors, self.state, scope
                )
            self._units[key].step(options, self.state)

    @contextmanager
    def _gathered(
        self, key: Tensor | None, pieces: Mapping[Tensor, list[Piece]] | None
    ) -> Iterator[None]:
        """A context in which the pieces of a shard have the parts from other processes.

        On leaving without an error, the new weights are sent back.

        Args:
            key: the shard; None for whole parameters, for which nothing is exchanged.
            pieces: the new pieces by tensor; None where the pieces are those of the last step.
        """
        if key is not None and pieces is not None:
            sharing = self.shards.sharing.get(key)
            if sharing is not None and sharing.peers is not None:
                layout = self.shards.layouts[key]
                self._exchanges[key] = Exchange(key, layout, sharing, pieces[key])
        exchange = None if key is None else self._exchanges.get(key)
        if exchange is None:
            yield
            return
        exchange.bring()
        try:
            yield
            exchange.give_back()
        finally:
            exchange.free()

    def _options(self, group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The settings of a parameter group of this optimizer for each of the wrapped classes."""
        settings = _settings(group)
        options = {MATRICES: settings}
        if VECTORS in self._roles:
            role = self._roles[VECTORS]
            stated = {
                key: value
                for key, value in settings.items()
                if key in role.defaults and key != "lr" and differs(value, self.defaults.get(key))
            }
            options[VECTORS] = {**role.defaults, **stated, **self._vectors_rate(group)}
        return options

    def _vectors_rate(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The learning rate of a group's vectors, if the class has one that follows the group's."""
        role, rate, first = self._roles[VECTORS], group.get("lr"), self.defaults.get("lr")
        if "lr" not in role.defaults or rate is None or first is None:
            return {}
        if "lr" not in role.args:
            return {"lr": rate}
        return {"lr": role.args["lr"] * (rate / first)}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
