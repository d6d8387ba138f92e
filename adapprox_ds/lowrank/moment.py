# SPDX-License-Identifier: Apache-2.0
"""LowRankMoment: a second moment that is factors physically and a tensor logically.

DeepSpeed keeps, slices, saves, moves and gathers optimizer state as tensors shaped like the flat
shard. A ``LowRankMoment`` is such a tensor: its shape, numel and dtype are those of the dense
``exp_avg_sq``. ``narrow`` gives a lazy piece that reads the factors of the moment it came from;
``clone``, ``detach``, ``to`` and pickling keep factors as factors; any other operation makes the
piece it is called on dense first. Writing is the optimizer's alone: in-place operations raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from adapprox_ds.lowrank.factors import FactorStore

_aten = torch.ops.aten

_NO_WRITES = (
    "{} would write into a factored second moment; to replace it, assign a dense tensor to "
    "state['exp_avg_sq'] (the next step factors it)"
)


class LowRankMoment(Tensor):
    """The logical dense second moment over a :class:`FactorStore`, or a lazy piece of it.

    Factors keep their own dtype: ``.to(torch.bfloat16)`` changes the dtype of what is read, so
    the casts that checkpoint loaders make lose nothing.

    Attributes:
        store: the factors; shared between a moment and its pieces.
        start: index in the store's flat tensor where this piece begins.
    """

    store: FactorStore
    start: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        store: FactorStore,
        size: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        start: int = 0,
    ) -> LowRankMoment:
        """Wrap ``store``; ``size`` is the logical shape, prod(size) elements from ``start``."""
        moment: LowRankMoment = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(size), dtype=dtype, device=store.device, requires_grad=False
        )
        moment.store = store
        moment.start = start
        return moment

    @property
    def is_whole(self) -> bool:
        """Whether this is the moment itself rather than a piece of it."""
        return self.start == 0 and self.numel() == self.store.numel

    @property
    def allocated_bytes(self) -> int:
        """Bytes really held by the store; ``nbytes`` is the dense moment's."""
        return self.store.allocated_bytes

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The piece's values as an ordinary new tensor of its shape and dtype."""
        flat = self.store.read(self.start, self.start + self.numel(), self.dtype)
        return flat.view(self.shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        ranks = [b.q.shape[1] for b in self.store.blocks]
        return (
            f"LowRankMoment(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, ranks={ranks}, bytes={self.allocated_bytes})"
        )

    @property
    def data(self) -> LowRankMoment:
        """The same moment; assigning to it raises, as the factors would stay what they are."""
        return _alias(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(_NO_WRITES.format("assignment to .data"))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise NotImplementedError(_NO_WRITES.format("item assignment"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_whole:
            return self.to_dense().__reduce_ex__(protocol)
        return _rebuild_moment, (self.store.to_payload(), tuple(self.shape), self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, cls) and (handler := _HANDLERS.get(func)):
            return handler(*args, **kwargs)
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(cls, cls.to_dense, (args, kwargs))
        return func(*args, **kwargs)


def _rebuild_moment(
    payload: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype
) -> LowRankMoment:
    return LowRankMoment(FactorStore.from_payload(payload), size, dtype)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if ``func`` would write to a moment: the write would land in a temporary and vanish."""
    if not func._schema.is_mutable:
        return
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        if any(isinstance(leaf, LowRankMoment) for leaf in tree_leaves(value)):
            raise NotImplementedError(_NO_WRITES.format(func))


def _alias(moment: LowRankMoment, *_: Any) -> LowRankMoment:
    return LowRankMoment(moment.store, moment.shape, moment.dtype, moment.start)


def _view(moment: LowRankMoment, size: list[int]) -> LowRankMoment:
    known = math.prod(s for s in size if s != -1)
    size = [moment.numel() // known if s == -1 and known else s for s in size]
    if math.prod(size) != moment.numel():
        raise RuntimeError(f"shape {size} is invalid for a moment of {moment.numel()} elements")
    return LowRankMoment(moment.store, tuple(size), moment.dtype, moment.start)


def _slice(
    moment: LowRankMoment,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    if moment.dim() != 1 or step != 1:
        return _aten.slice.Tensor(moment.to_dense(), dim, start, end, step)
    lo, hi, _ = slice(start, end).indices(moment.numel())
    return LowRankMoment(moment.store, (max(hi - lo, 0),), moment.dtype, moment.start + lo)


def _clone(moment: LowRankMoment, *, memory_format: Any = None) -> Tensor:
    if not moment.is_whole:
        return moment.to_dense()
    return LowRankMoment(moment.store.map(torch.clone), moment.shape, moment.dtype)


def _to_copy(
    moment: LowRankMoment,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    if not moment.is_whole:
        return moment.to_dense().to(dtype=dtype, device=device, non_blocking=non_blocking)

    def move(t: Tensor) -> Tensor:
        return t.to(device or t.device, copy=True, non_blocking=non_blocking)

    return LowRankMoment(moment.store.map(move), moment.shape, dtype or moment.dtype)


def _pin_memory(moment: LowRankMoment, *_: Any) -> LowRankMoment:
    return LowRankMoment(moment.store.map(Tensor.pin_memory), moment.shape, moment.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.slice.Tensor: _slice,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten._pin_memory.default: _pin_memory,
}

torch.serialization.add_safe_globals([_rebuild_moment])
