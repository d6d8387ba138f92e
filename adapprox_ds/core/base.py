# SPDX-License-Identifier: Apache-2.0
"""The base class of this package's optimizers: parameter groups, shards, the order of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapprox_ds.core.agreement import settle
from adapprox_ds.core.inputs import require_inputs
from adapprox_ds.core.kernels import self_check
from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.core.nonfinite import NonfiniteGradientError, describe
from adapprox_ds.core.refusals import Refusals
from adapprox_ds.core.rules import GroupSettings
from adapprox_ds.core.shards import ShardTable
from adapprox_ds.core.state import settle_steps


def add_group(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    settings: Mapping[str, Any],
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Add a parameter group to an optimizer; if it is refused, the optimizer is unchanged.

    The caller's dict itself becomes the group.

    Args:
        optimizer: the optimizer.
        group: the group; keys that it lacks are added, as ``torch.optim.Optimizer`` does.
        settings: further keys and values to add.
        record: called with the completed group; it may refuse the group by raising an error.
    """
    taken = {**group, **settings}
    if not isinstance(taken["params"], Tensor | set):
        taken["params"] = list(taken["params"])
        _name_as_others(optimizer.param_groups, taken)
    torch.optim.Optimizer.add_param_group(optimizer, taken)
    try:
        record(taken)
    except BaseException:
        optimizer.param_groups.pop()
        raise
    group.update(taken)
    optimizer.param_groups[-1] = group


def _name_as_others(groups: list[dict[str, Any]], taken: dict[str, Any]) -> None:
    """Give groups without parameters names if the others have names; torch wants all or none."""
    members = taken["params"]
    named = "param_names" in taken or (bool(members) and isinstance(members[0], tuple))
    if not members and groups:
        named = "param_names" in groups[0]
    for group in (*groups, taken):
        if not group["params"] and not group.get("param_names"):
            group.pop("param_names", None)
            if named:
                group["param_names"] = []


class ShardOptimizer(torch.optim.Optimizer):
    """An optimizer that steps parameters of any shape, and the flat shards of DeepSpeed's ZeRO.

    A subclass sets the class variables, and defines the methods that raise NotImplementedError.

    Attributes:
        shards: the layouts of the tensors that the optimizer steps.
        skipped: the number of steps that this process left out, as a gradient was not finite.
        shards_class: the class of ``shards``.
        settings_class: the class of the settings of a parameter group.
        refusals: the arguments that are refused.
        loads_dense_moments: whether a step can start from dense moments, such as an Adam's, or
            those that DeepSpeed's loader of universal checkpoints makes.
    """

    shards: ShardTable[Any]
    shards_class: ClassVar[type[ShardTable[Any]]] = ShardTable
    settings_class: ClassVar[type[GroupSettings]]
    refusals: ClassVar[Refusals]
    loads_dense_moments: ClassVar[bool]

    def __init__(
        self,
        params: Any,
        arguments: Mapping[str, Any],
        make: Callable[[dict[str, Any]], GroupSettings] | None = None,
    ) -> None:
        """Validate a subclass's arguments and add its groups.

        Args:
            params: parameters, named parameters, or parameter groups.
            arguments: the ``locals()`` of the subclass's constructor. Those that were not given
                are None, and "unsupported" has those that the constructor does not know.
            make: makes the settings from the given arguments; by default ``settings_class``.
        """
        self.refusals.unknown(arguments["unsupported"])
        given = {n: v for n in self.field_names if (v := arguments[n]) is not None}
        settings = make(given) if make else self.settings_class(**given)
        self.shards, self.skipped = self.shards_class(settings.owner), 0
        super().__init__(params, settings.as_defaults(given))

    @property
    def field_names(self) -> tuple[str, ...]:
        """The names of the settings."""
        return self.settings_class.names()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyper-parameters are validated like the constructor's."""
        self.refusals.in_group(param_group)
        settings = self.settings_class.of_group({**self.defaults, **param_group})
        record = partial(self.shards.record_group, settings=settings)
        add_group(self, param_group, settings.as_group(), record)

    def _is_ready(self, state: dict[str, Any]) -> bool:
        """Whether a step can use a shard's state as it is; not if it is empty or an Adam's."""
        raise NotImplementedError

    def _make_ready(self, p: Tensor, settings: Any) -> None:
        """Create the state of a parameter or shard, or convert it to the form that a step uses."""
        raise NotImplementedError

    def _settings_in_force(self, group: dict[str, Any]) -> Any:
        """A group's settings for the step that is about to be made."""
        return self.settings_class.of_group(group)

    def _check_kernels(self, groups: list[tuple[list[Tensor], Any]]) -> None:
        """Check each form of the kernels that steps can need; see :func:`settle`.

        Args:
            groups: the tensors that are being stepped; ``shards`` knows those of other groups.
        """
        raise NotImplementedError

    def _step_groups(self, groups: list[tuple[list[Tensor], Any]]) -> None:
        """Step parameters or shards that have a gradient; each list with its group's settings."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        settle_steps(state["state"], state["param_groups"])  # before anything is replaced
        # A load keeps the groups' number and order. Neither list has groups that DeepSpeed dropped.
        before = self.__dict__.get("param_groups", ())
        for group, old in zip(state["param_groups"], before, strict=False):
            self._require_loadable(group, old)
        super().__setstate__(state)
        self.__dict__.setdefault("skipped", 0)
        if "shards" not in self.__dict__:
            self.shards = self.shards_class(type(self).__name__)
            for group in self.param_groups:
                self.shards.record_group(group, self.settings_class.of_group(group))
        for group, old in zip(self.param_groups, before, strict=False):
            self._complete_group(group, old)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep each moment in the dtype that it was saved in.

        torch would cast it to the parameter's dtype, but a bf16 parameter may have fp32 moments.
        """
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                # The step count stays on the CPU, and compact tensors keep their own dtypes.
                held = self.state[p].get(key)
                if key == "step" or type(value) is not Tensor or type(held) is not Tensor:
                    continue
                if held.dtype != value.dtype:
                    self.state[p][key] = value.to(held.device, copy=True)

    def _require_loadable(self, group: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Raise where a group that is to be loaded has a state that this one cannot go on from."""

    def _complete_group(self, group: dict[str, Any], before: Mapping[str, Any]) -> None:
        """Give a loaded group the settings that it lacks, as they were before the load."""
        for name in self.field_names:
            group.setdefault(name, before[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter or shard that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: the parameters of a shard cannot be found.
            RuntimeError, TypeError, ValueError: a parameter or gradient cannot be used
                (:func:`require_inputs`); nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with ExitStack() as outside:
            # Autocast would compute products in other dtypes than those of their operands.
            for kind in {"cpu", *(p.device.type for p in active)}:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    outside.enter_context(torch.autocast(kind, enabled=False))
            self._step_active(active)
        return loss

    def _step_active(self, active: list[Tensor]) -> None:
        """Make one step of the tensors that have a gradient."""
        self.shards.locate(active)
        for p in active:
            whole = self.shards.is_whole(p)
            require_inputs(self.shards.owner, p, self.shards.layouts[p], whole)
        if self.shards.is_dummy_step(active, self.state):
            return
        self.init_state(lazily=True)
        groups = [
            (
                [p for p in group["params"] if p.grad is not None and not self.shards.is_frozen(p)],
                self._settings_in_force(group),
            )
            for group in self.param_groups
        ]
        settle(partial(self._check_kernels, groups), {p.device for p in active}, self.shards)
        with self_check.closed(bool(self.shards.agreed)):
            self._step_groups(groups)

    def init_state(self, *, lazily: bool = False) -> None:
        """Allocate the state that the first step would allocate.

        DeepSpeed links the states of all groups after the step of the first group, so those of all
        shards are made at once (runtime/zero/stage_1_and_2.py,
        _lazy_init_hp_params_optimizer_state). Frozen parameters get no state.

        Args:
            lazily: whether to do so for ZeRO's shards only; any other parameter then gets its state
                when it has its first gradient.
        """
        for p, settings in self.shards.settings_by_shard():
            if not self._is_ready(self.state[p]):
                self._make_ready(p, settings)
        if lazily:
            return
        for group in self.param_groups:
            settings = self.settings_class.of_group(group)
            trained = [p for p in group["params"] if p.requires_grad]
            self.shards.locate(trained)
            for p in trained:
                self._make_ready(p, settings)

    def _all_at_hand(self, groups: list[tuple[list[Tensor], Any]]) -> Iterator[tuple[Tensor, Any]]:
        """Yield the tensors of some groups, and all other shards, with their settings."""
        found = {p: settings for params, settings in groups for p in params}
        yield from {**dict(self.shards.settings_by_shard()), **found}.items()

    @contextmanager
    def _left_out(self, modes: set[str], pieces: Sequence[Any]) -> Iterator[None]:
        """A context that leaves out a step, or by ``modes`` raises, if gradients are not finite."""
        try:
            yield
        except NonfiniteGradientError:
            self.skipped += 1
            if "raise" in modes:
                raise NonfiniteGradientError(describe(self.shards.owner, pieces)) from None

    def _held(self) -> Iterator[tuple[Tensor, ShardLayout, dict[str, Any]]]:
        """Every tensor that has state on this process, with its layout and its state."""
        states = {p: s for p, s in self.state.items() if s}
        self.shards.locate_own(states)
        layouts = self.shards.layouts
        return ((p, layouts[p], s) for p, s in states.items() if p in layouts)
