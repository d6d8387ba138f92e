# SPDX-License-Identifier: Apache-2.0
"""The tensors that an optimizer steps, parameters or ZeRO's shards, each with its layout.

A shard is a flat tensor in which this process holds parameters, or parts of them. Its layout
(:mod:`adapprox_ds.core.layout`) says which part of which parameter lies at which offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.nn.parameter import is_lazy

from adapprox_ds.core.inputs import refuse_unsteppable
from adapprox_ds.core.layout import NamedParameter, ParamFragment, ShardLayout

#: The class of an optimizer's validated settings of a group.
H = TypeVar("H")


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One flat tensor that this process steps.

    Attributes:
        flat: the tensor that the optimizer is stepped with, 1-D; a clone has its parameter's shape.
        group: the index of its parameter group in the optimizer's constructor. DeepSpeed's own
            indices leave out groups without parameters.
        layout: which part of which parameter lies at which offset in it.
        sources: each fragment with the parameter that it is a part of.
        is_clone: whether it is the fp32 clone of a whole parameter (stage 0).
        process_group: torch's process group that it is partitioned over; None where that is not
            known, or where nothing is partitioned.
    """

    flat: Tensor
    group: int
    layout: ShardLayout
    sources: tuple[tuple[ParamFragment, Tensor], ...]
    is_clone: bool = False
    process_group: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that lie in it."""
        return tuple(part.fragment.name for part in self.layout.fragments)

    @classmethod
    def of(
        cls,
        flat: Tensor,
        group: int,
        sources: Iterable[tuple[ParamFragment, Tensor]],
        is_clone: bool = False,
        process_group: Any = None,
    ) -> Shard:
        """Build the layout of ``flat`` from its fragments."""
        pairs = tuple(sources)
        layout = ShardLayout.build([fragment for fragment, _ in pairs], flat.numel())
        return cls(flat, group, layout, pairs, is_clone, process_group)


#: Finds out which of some tensors are shards, and lets the table adopt them. It is called for an
#: optimizer without an attached engine, with tensors of a step whose layouts are not known.
Resolver = Callable[["ShardTable[Any]", Sequence[Tensor]], None]

_resolver: Resolver | None = None


def set_resolver(resolver: Resolver) -> None:
    """Set the function that finds the shards where nobody called ``attach``.

    The code that reads DeepSpeed's tables lies above this folder, so it registers itself here when
    it is imported (zero/__init__.py).
    """
    global _resolver
    _resolver = resolver


class ShardTable(Generic[H]):
    """The layouts of an optimizer's tensors, and the parameters that it was built from.

    After the optimizer's construction DeepSpeed replaces the parameters of its groups by shards.
    The parameters are recorded before that: where nobody called ``attach``, they lead to
    DeepSpeed's tables, which say what a shard contains. All of this can be derived again and is
    never part of the optimizer's state.

    Attributes:
        owner: the optimizer's name, for messages.
        layouts: the layout of every tensor whose layout is known so far.
        recorded: the parameters of each group that was added, with their names.
        settings: the settings of each recorded group. While DeepSpeed steps one group, the dicts of
            the others are out of the optimizer's reach, so their settings are kept here.
        norm: returns the norm of all gradients of the current step, or None where it is not known.
        agree: makes the processes that share shards agree on a flag (``GradientCheck.start``); None
            where each process can decide alone.
        process_group: torch's process group of the processes that step together; None where it is
            not known.
        agreed: whether these processes agreed on kernels (:mod:`adapprox_ds.core.agreement`); None
            before the first step.
        attached: whether an engine was attached: its layouts were read, or, where it has no shards,
            the processes' settings were compared.
        allows_nonfinite: whether the engine's configuration asks to train on with gradients that
            are not finite.
        padding: for groups of which this process's shard contains no parameter, only padding: the
            index of the group, mapped to the sizes that the shard can have. Filled only where
            nobody called ``attach``.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.layouts: dict[Tensor, ShardLayout] = {}
        self.recorded: list[list[NamedParameter]] = []
        self.settings: list[H] = []
        self._names: dict[Tensor, str] = {}
        self._groups: dict[Tensor, int] = {}
        self._resolved = False
        self._clones: dict[Tensor, Tensor] = {}
        self.norm: Callable[[], Any] = lambda: None
        self.agree: Callable[[Tensor], Tensor] | None = None
        self.process_group: Any = None
        self.agreed: bool | None = None
        self.attached = False
        self.allows_nonfinite = False
        self.padding: dict[int, frozenset[int]] = {}

    def record_group(self, group: Mapping[str, Any], settings: H) -> None:
        """Record the parameters of a group as the user gave it.

        Args:
            group: the group's dict: ``params``, and ``param_names`` where the user gave names.
            settings: the group's validated settings.

        Raises:
            ValueError, TypeError: a parameter that requires a gradient is of a kind that cannot be
                trained (:meth:`_refuse`).
        """
        params: Sequence[Tensor] = group["params"]
        # Names seed the sketches, so they must not count empty groups, which DeepSpeed drops.
        index = sum(map(bool, self.recorded))
        names = group.get("param_names") or [f"group{index}.{i}" for i in range(len(params))]
        for name, p in zip(names, params, strict=True):
            # Frozen and lazy parameters are checked in their first step.
            if p.requires_grad and not is_lazy(p):
                self._refuse(name, p)
        self._names.update(zip(params, names, strict=True))
        self.recorded.append([NamedParameter(*pair) for pair in zip(names, params, strict=True)])
        self.settings.append(settings)

    def _refuse(self, name: str, p: Tensor) -> None:
        """Raise for a parameter that cannot be trained.

        Raises:
            ValueError: its dtype is complex, or is not a floating point dtype.
            ValueError, TypeError: see :func:`refuse_unsteppable`.
        """
        refuse_unsteppable(self.owner, name, p)
        if not p.is_floating_point():
            raise ValueError(
                f"{self.owner}: parameter {name!r} has dtype {p.dtype}; allowed: real floating "
                "point (view complex parameters as real)"
            )

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Add the layouts of shards that were read from DeepSpeed's objects and verified."""
        for shard in shards:
            self.layouts[shard.flat] = shard.layout
            self._groups[shard.flat] = shard.group
            if shard.is_clone:
                ((_, self._clones[shard.flat]),) = shard.sources
        self._resolved = True

    def locate_own(self, tensors: Iterable[Tensor]) -> None:
        """Add the layouts of those tensors that are recorded parameters themselves.

        Raises:
            ValueError, TypeError: a parameter that was frozen when it was recorded is of a kind
                that cannot be trained (:meth:`_refuse`).
        """
        for p in tensors:
            if p not in self.layouts and p in self._names:
                self._refuse(self._names[p], p)
                self.layouts[p] = ShardLayout.of_parameter(self._names[p], p.shape)

    def locate(self, tensors: Sequence[Tensor]) -> None:
        """Make sure that the layout of each tensor is known.

        Where nobody attached an engine, the first call looks for the shards in what DeepSpeed left
        on the recorded parameters.

        Raises:
            RuntimeError: a tensor is neither a recorded parameter nor a shard of such parameters.
            ValueError, TypeError: see :meth:`locate_own`.
        """
        self.locate_own(tensors)
        unknown = [p for p in tensors if p not in self.layouts]
        if not unknown:
            return
        if not self._resolved and _resolver is not None:
            # Only here does a step read DeepSpeed's tables. In plain torch no tensor is unknown.
            _resolver(self, unknown)
        for p in unknown:
            if p not in self.layouts and not self._take_padding(p):
                raise RuntimeError(
                    f"{self.owner} was stepped with a tensor of shape {tuple(p.shape)} that is no "
                    "parameter that it was built from, and no shard of some: another engine's, or "
                    "the groups were changed after deepspeed.initialize. Build an optimizer for "
                    "each engine, by adapprox_ds.initialize or before deepspeed.initialize"
                )

    def nonfinite(self, given: Iterable[str | None]) -> set[str]:
        """The modes ("raise", "skip", "propagate") that any of some groups has.

        Args:
            given: the ``nonfinite`` setting of each group. None, where the user gave none, is
                replaced by the default of the engine's configuration.
        """
        default = "propagate" if self.allows_nonfinite else "raise"
        return {mode or default for mode in given}

    def _take_padding(self, tensor: Tensor) -> bool:
        """Add a tensor as a shard of nothing but padding, if its size is that of such a shard.

        Returns:
            Whether the tensor was added.
        """
        sizes = self.padding.items() if tensor.dim() == 1 else ()
        group = next((group for group, fits in sizes if tensor.numel() in fits), None)
        if group is None:
            return False
        del self.padding[group]
        self.layouts[tensor] = ShardLayout(tensor.numel(), ())
        self._groups[tensor] = group
        return True

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a located tensor is a whole parameter, or the fp32 clone of one."""
        return tensor in self._names or tensor in self._clones

    def is_frozen(self, tensor: Tensor) -> bool:
        """Whether a tensor is the fp32 clone of a parameter that is not trained.

        DeepSpeed gives such a clone a gradient of zeros, and weight decay would then shrink it. It
        has clones of parameters that were frozen after ``deepspeed.initialize``, and before 0.19.8
        of every frozen parameter.
        """
        return tensor in self._clones and not self._clones[tensor].requires_grad

    def is_dummy_step(self, active: Sequence[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether this is FP16_UnfusedOptimizer's step for allocation, which must change nothing.

        DeepSpeed calls ``step`` once with gradients of zeros before ``deepspeed.initialize``
        returns, and decoupled weight decay would shrink the weights then
        (runtime/fp16/unfused_optimizer.py, initialize_optimizer_states). Gradients are looked at
        only while there is no state, before the first real step.

        Args:
            active: the tensors that have a gradient.
            state: the optimizer's state.
        """
        if not self._clones or any(state.get(p) for p in active):
            return False
        return not any(p.grad is not None and bool(p.grad.any()) for p in active)

    def settings_by_shard(self) -> Iterator[tuple[Tensor, H]]:
        """Yield every shard of this process that is trained, with the settings of its group."""
        for flat, group in self._groups.items():
            if not self.is_frozen(flat):
                yield flat, self.settings[group]
