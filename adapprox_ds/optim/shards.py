# SPDX-License-Identifier: Apache-2.0
"""What lies where in each tensor that an optimizer is stepped with: parameters or ZeRO shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor
from torch.nn.parameter import is_lazy

from adapprox_ds.optim.inputs import refuse_unsteppable
from adapprox_ds.zero.layout import NamedParameter, ShardLayout
from adapprox_ds.zero.peers import Peers, find_peers

if TYPE_CHECKING:
    from adapprox_ds.optim.fragment import Fragment
    from adapprox_ds.zero.discover import Shard

#: What an optimizer keeps its groups' settings in.
H = TypeVar("H")


class ShardLayouts:
    """Layouts by tensor, and the parameters that the optimizer was built from.

    DeepSpeed replaces the parameters of the groups by flat shards after construction; the recorded
    parameters are how a shard is resolved when nobody called ``attach``. Derived data: never part
    of the optimizer's state.

    Attributes:
        owner: the optimizer's name.
        layouts: of every tensor seen so far.
        norm: gives the norm of all gradients of the step at hand, or None.
        agree: makes ranks that share shards agree on a flag (``GradientCheck.start``), or None.
        ranks: torch's process group of the ranks that step together, or None where it is not known.
        agreed: whether those agreed on kernels; None before the first step.
        attached: whether they were read off an engine, or ranks that need none were compared.
        lets_through: whether the configuration of the engine asks not to be stopped by gradients
            that are not finite.
        padding: by recorded group, the sizes that this rank's shard of it can have, where nobody
            called ``attach`` and no parameter of the group lies in that shard.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.layouts: dict[Tensor, ShardLayout] = {}
        self.recorded: list[list[NamedParameter]] = []
        self._names: dict[Tensor, str] = {}
        self._groups: dict[Tensor, int] = {}
        self._resolved = False
        self._clones: dict[Tensor, Tensor] = {}
        self.norm: Callable[[], Any] = lambda: None
        self.agree: Callable[[Tensor], Tensor] | None = None
        self.ranks: Any = None
        self.agreed: bool | None = None
        self.attached = False
        self.lets_through = False
        self.padding: dict[int, frozenset[int]] = {}

    def record(self, group: Mapping[str, Any]) -> None:
        """Remember a parameter group as the user gave it.

        Raises:
            ValueError, TypeError: a parameter that is trained cannot be (:meth:`_refuse`).
        """
        params: Sequence[Tensor] = group["params"]
        # Names seed sketches, so empty groups, which DeepSpeed drops, do not count.
        index = sum(map(bool, self.recorded))
        names = group.get("param_names") or [f"group{index}.{i}" for i in range(len(params))]
        for name, p in zip(names, params, strict=True):
            # Others are looked at in their first step.
            if p.requires_grad and not is_lazy(p):
                self._refuse(name, p)
        self._names.update(zip(params, names, strict=True))
        self.recorded.append([NamedParameter(*pair) for pair in zip(names, params, strict=True)])

    def _refuse(self, name: str, p: Tensor) -> None:
        """Raise for a parameter that cannot be trained.

        Raises:
            ValueError: it is complex or not a floating point number.
            ValueError, TypeError: see :func:`refuse_unsteppable`.
        """
        refuse_unsteppable(self.owner, name, p)
        if not p.is_floating_point():
            raise ValueError(
                f"{self.owner}: parameter {name!r} has dtype {p.dtype}; allowed: real floating "
                "point (view complex parameters as real)"
            )

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Take over layouts that were read off DeepSpeed's objects and verified."""
        for shard in shards:
            self.layouts[shard.flat] = shard.layout
            self._groups[shard.flat] = shard.group
            if shard.is_clone:
                ((_, self._clones[shard.flat]),) = shard.sources
        self._resolved = True

    def locate_own(self, tensors: Iterable[Tensor]) -> None:
        """Note the layout of those tensors that are recorded parameters themselves.

        Raises:
            ValueError, TypeError: one that was frozen so far cannot be trained (:meth:`_refuse`).
        """
        for p in tensors:
            if p not in self.layouts and p in self._names:
                self._refuse(self._names[p], p)
                self.layouts[p] = ShardLayout.of_parameter(self._names[p], p.shape)

    def locate(self, tensors: Sequence[Tensor]) -> None:
        """Make sure that the layout of each tensor is known.

        Raises:
            RuntimeError: a tensor is neither a recorded parameter nor a shard of some.
        """
        self.locate_own(tensors)
        strangers = [p for p in tensors if p not in self.layouts]
        if not strangers:
            return
        if not self._resolved:
            # The one place where a step needs DeepSpeed's tables; only under DeepSpeed.
            from adapprox_ds.zero import unattached

            unattached.find(self, strangers)
        for p in strangers:
            if p not in self.layouts and not self._take_padding(p):
                raise RuntimeError(
                    f"{self.owner} was stepped with a tensor of shape {tuple(p.shape)} that is no "
                    "parameter that it was built from, and no shard of some: another engine's, or "
                    "the groups were changed after deepspeed.initialize. Build an optimizer for "
                    "each engine, by adapprox_ds.initialize or before deepspeed.initialize"
                )

    def nonfinite(self, given: Iterable[str | None]) -> set[str]:
        """What groups' settings of ``nonfinite`` come to under DeepSpeed's configuration."""
        default = "propagate" if self.lets_through else "raise"
        return {mode or default for mode in given}

    def _take_padding(self, tensor: Tensor) -> bool:
        """Note that a tensor is a group's shard without parameters, if it can be."""
        sizes = self.padding.items() if tensor.dim() == 1 else ()
        group = next((group for group, fits in sizes if tensor.numel() in fits), None)
        if group is None:
            return False
        del self.padding[group]
        self.layouts[tensor] = ShardLayout(tensor.numel(), ())
        self._groups[tensor] = group
        return True

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a located tensor is a parameter or its fp32 clone, and no shard."""
        return tensor in self._names or tensor in self._clones

    def is_frozen(self, tensor: Tensor) -> bool:
        """Whether it is the fp32 clone of a parameter that is not trained.

        DeepSpeed gives such a clone a gradient of zeros, which would decay it: of a parameter that
        was frozen after ``deepspeed.initialize``, and before 0.19.8 of every frozen one.
        """
        return tensor in self._clones and not self._clones[tensor].requires_grad

    def is_dummy_step(self, active: Sequence[Tensor], state: Mapping[Tensor, Any]) -> bool:
        """Whether this is FP16_UnfusedOptimizer's allocation step, which must change nothing.

        It steps once with zero gradients before ``deepspeed.initialize`` returns, and decoupled
        weight decay would shrink the weights (runtime/fp16/unfused_optimizer.py,
        initialize_optimizer_states). Looks at gradients before the first real step only.
        """
        if not self._clones or any(state.get(p) for p in active):
            return False
        return not any(p.grad is not None and bool(p.grad.any()) for p in active)


class ShardTable(ShardLayouts, Generic[H]):
    """Layouts, and the settings of an optimizer's groups.

    Attributes:
        settings: each group's settings at construction. DeepSpeed narrows and re-creates group
            dicts, so another group's are not readable during a step.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.settings: list[H] = []

    def record_group(self, group: Mapping[str, Any], settings: H) -> None:
        """Remember a parameter group and its settings; see :meth:`record`."""
        self.record(group)
        self.settings.append(settings)

    def settings_by_shard(self) -> Iterator[tuple[Tensor, H]]:
        """Every DeepSpeed shard of this process that is trained, with its group's settings."""
        for flat, group in self._groups.items():
            if not self.is_frozen(flat):
                yield flat, self.settings[group]


class MatrixTable(ShardTable[Any]):
    """Layouts of Adapprox's shards, of which ranks may factor the cut matrices together.

    Attributes:
        peers: of the shards whose cut matrices are factored as one, who holds the rest.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.peers: dict[Tensor, Peers] = {}

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Take over layouts; with the scope "matrix" a collective call.

        Raises:
            RuntimeError: a shard's ranks are not known.
        """
        shards = list(shards)
        peers, layouts = {}, {}
        for shard in shards:
            h = self.settings[shard.group]
            if h.scope == "partition" or shard.is_clone:
                continue
            if shard.ranks is None:
                raise RuntimeError(
                    "scope='matrix' needs to know the ranks of a shard; build the engine by "
                    "adapprox_ds.initialize, or call adapprox_ds.attach(engine) before the first "
                    "step"
                )
            fragments = [part.fragment for part in shard.layout.fragments]
            peers[shard.flat] = find_peers(fragments, shard.ranks)
            layouts[shard.flat] = shard.layout.with_scope(h.scope, h.shards_u)
        # Nothing is taken over where a shard is refused.
        super().adopt(shards)
        self.peers.update(peers)
        self.layouts.update(layouts)

    def uncut(self, flat: Tensor, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Those of a tensor's fragments that are stepped without other ranks."""
        cut = self.peers[flat].cut if flat in self.peers else {}
        return [f for f in fragments if f.layout.fragment.name not in cut]
