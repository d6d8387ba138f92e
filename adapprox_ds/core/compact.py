# SPDX-License-Identifier: Apache-2.0
"""CompactTensor: optimizer state that is stored compactly and looks like a dense tensor.

DeepSpeed keeps, slices, saves, moves and gathers optimizer state as tensors shaped like the flat
shard. A ``CompactTensor`` is such a tensor: its shape, numel and dtype are those of the dense
state, while its store holds factors, codes or the like. Its operations are these:

- ``narrow`` returns a lazy piece that shares the store.
- ``clone``, ``detach``, ``to`` and pickling keep the compact form.
- ``copy_`` from a whole tensor of the same class takes over a copy of its store, bit for bit.
  ``copy_`` from dense values, which DeepSpeed's ``safe_set_full_optimizer_state`` uses, works
  where the subclass defines :meth:`CompactTensor.write`.
- Other in-place operations raise.
- Any other operation works on a dense copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from adapprox_ds.core import saved

if TYPE_CHECKING:
    from typing import Self

_aten = torch.ops.aten
_C = TypeVar("_C", bound="CompactTensor")


class Store(Protocol):
    """The compact form of one flat tensor: what a :class:`CompactTensor` stores."""

    @property
    def numel(self) -> int:
        """The number of elements of the flat tensor that the store represents."""

    @property
    def device(self) -> torch.device:
        """The device of the store's tensors."""

    @property
    def allocated_bytes(self) -> int:
        """The bytes of the store's tensors."""

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the flat tensor, as a new dense 1-D tensor."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A new store with ``change``, such as a move to a device, applied to each tensor."""

    def to_payload(self) -> dict[str, Any]:
        """The store as plain containers and tensors, loadable with ``weights_only=True``."""

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`; raises a ValueError for a damaged payload."""


class TensorStore:
    """The part of a store that is the same for every dataclass with some tensors among its fields.

    Attributes:
        kept: the names of the fields that are tensors, all on one device.
    """

    __slots__ = ()
    kept: ClassVar[tuple[str, ...]]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        device: torch.device = getattr(self, self.kept[0]).device
        return device

    @property
    def allocated_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(getattr(self, name).nbytes for name in self.kept)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A new store with ``change``, such as a move to a device, applied to each tensor."""
        changed = {name: change(getattr(self, name)) for name in self.kept}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Blank:
    """The store of a tensor that was made as the target of a ``copy_`` which has yet to come.

    DeepSpeed moves state to pinned memory in this way (zero/offload_states.py,
    offload_optimizer_states):
    ``buffer = state.new_empty((0,), device="cpu").new_empty(state.shape, pin_memory=True)`` and
    ``buffer.copy_(state)``. A dense buffer would make the state dense.

    Attributes:
        numel: the number of elements of the flat tensor.
        device: the device that the copy will be on.
        pinned: whether the copy will be in page-locked memory.
    """

    numel: int
    device: torch.device
    pinned: bool
    allocated_bytes: int = 0

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Zeros, as a new tensor has no defined elements."""
        return torch.zeros(end - begin, dtype=dtype, device=self.device)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The store itself, as it has no tensors."""
        return self

    def to_payload(self) -> dict[str, Any]:
        """Raises, as there is nothing to save."""
        raise NotImplementedError("a tensor that nothing was copied to cannot be saved")

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """Raises, as none was saved."""
        raise NotImplementedError(f"a {cls.__name__} is never saved")


class CompactTensor(Tensor):
    """A tensor whose elements are computed from a :class:`Store`, or a lazy piece of one.

    A store keeps its own dtypes: ``.to(torch.bfloat16)`` changes only the dtype in which elements
    are read, so the casts that checkpoint loaders make lose nothing.

    A subclass defines the type of ``store``, ``store_class`` and ``no_writes``.

    Attributes:
        store: the compact form; a tensor and its pieces share it.
        start: the index in the store's flat tensor of this piece's first element.
        store_class: the class of the store.
        no_writes: the message of refused writes; its ``{}`` stands for the operation.
    """

    store: Store
    start: int
    store_class: ClassVar[type[Store]]
    no_writes: ClassVar[str]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        store: Store,
        size: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        start: int = 0,
    ) -> Self:
        """Wrap prod(size) elements of ``store``, from ``start`` on, as a tensor of that size."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(size), dtype=dtype, device=store.device, requires_grad=False
        )
        made.store = store
        made.start = start
        return made

    @property
    def is_whole(self) -> bool:
        """Whether this is a tensor of all of the store's elements, and no piece of one."""
        return self.start == 0 and self.numel() == self.store.numel

    @property
    def allocated_bytes(self) -> int:
        """The bytes of the store's tensors; ``nbytes`` is what a dense tensor would take."""
        return self.store.allocated_bytes

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The elements as an ordinary new tensor of the same shape and dtype."""
        flat = self.store.read(self.start, self.start + self.numel(), self.dtype)
        return flat.view(self.shape)

    def write(self, values: Tensor) -> None:
        """Replace this tensor's elements; subclasses override it where that is possible.

        Args:
            values: the new elements, a dense tensor of shape (numel,).

        Raises:
            NotImplementedError: the compact form cannot hold given elements.
        """
        raise NotImplementedError(self.no_writes.format("copy_"))

    def describe(self) -> str:
        """The description of the store in ``repr``."""
        return f"numel={self.store.numel}"

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, {self.describe()}, bytes={self.allocated_bytes})"
        )

    @property
    def data(self) -> Self:
        """The same tensor; assigning to it raises, as that would not change the store."""
        return _alias(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(self.no_writes.format("assignment to .data"))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise NotImplementedError(self.no_writes.format("item assignment"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        _KINDS[cls.__name__] = cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_whole:
            return self.to_dense().__reduce_ex__(protocol)
        kind = type(self).__name__
        held = (kind, self.store.to_payload(), tuple(self.shape), self.dtype)
        return rebuild, (*held, saved.seal(held))

    @classmethod
    def restore(cls, *held: Any) -> Self:
        """Make a tensor from what ``__reduce_ex__`` saved, after checking it.

        Args:
            held: the store's payload, the tensor's shape and dtype, and the checksum of these three
                and the name of the class (:func:`adapprox_ds.core.saved.seal`).

        Raises:
            ValueError: a field cannot be right, or the checksum is wrong.
        """
        owner = cls.__name__
        payload, size, dtype, seal = saved.items(held, owner, 4)
        made = cls.store_class.from_payload(payload)
        shape = saved.integers(size, f"{owner}: the shape")
        if math.prod(shape) != made.numel:
            raise ValueError(f"{owner}: the shape {shape} does not have {made.numel} elements")
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{owner}: {dtype!r} is no floating-point dtype")
        if type(seal) is not int or seal != saved.seal((owner, payload, shape, dtype)):
            raise ValueError(
                f"{owner}: sizes, offsets or settings are not those that were saved: the "
                "checkpoint is damaged; use another one"
            )
        return cls(made, shape, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, CompactTensor):
            if handler := _HANDLERS.get(func):
                return handler(*args, **kwargs)
        _refuse_writes(func, args, kwargs)
        # The arguments of one operation may be of several subclasses.
        args, kwargs = tree_map_only(CompactTensor, CompactTensor.to_dense, (args, kwargs))
        return func(*args, **kwargs)


#: The subclasses by name; a pickle contains the name.
_KINDS: dict[str, type[CompactTensor]] = {}


def rebuild(kind: str, *held: Any) -> CompactTensor:
    """The function that a pickle calls: the inverse of ``CompactTensor.__reduce_ex__``.

    Args:
        kind: the name of the subclass.
        held: see :meth:`CompactTensor.restore`.

    Raises:
        ValueError: there is no such subclass, or the saved fields are damaged.
    """
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"a compact tensor of kind {kind!r} is unknown; known: {sorted(_KINDS)}")
    return _KINDS[kind].restore(*held)


torch.serialization.add_safe_globals([rebuild])


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if ``func`` would write to a compact tensor, as only a dense copy would change."""
    if not func._schema.is_mutable:
        return
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        for leaf in tree_leaves(value):
            if isinstance(leaf, CompactTensor):
                raise NotImplementedError(leaf.no_writes.format(func))


def _part(whole: _C, size: torch.Size | tuple[int, ...], start: int) -> _C:
    """A tensor of shape ``size`` that shares ``whole``'s store, from its element ``start`` on."""
    return type(whole)(whole.store, size, whole.dtype, start)


def _alias(piece: _C, *_: Any) -> _C:
    return _part(piece, piece.shape, piece.start)


def _view(piece: _C, size: list[int]) -> _C:
    known = math.prod(s for s in size if s != -1)
    size = [piece.numel() // known if s == -1 and known else s for s in size]
    if math.prod(size) != piece.numel():
        raise RuntimeError(f"shape {size} is invalid for a moment of {piece.numel()} elements")
    return _part(piece, tuple(size), piece.start)


def _slice(
    piece: CompactTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    if piece.dim() != 1 or step != 1:
        return _aten.slice.Tensor(piece.to_dense(), dim, start, end, step)
    lo, hi, _ = slice(start, end).indices(piece.numel())
    return _part(piece, (max(hi - lo, 0),), piece.start + lo)


def _clone(piece: CompactTensor, *, memory_format: Any = None) -> Tensor:
    if not piece.is_whole:
        return piece.to_dense()
    return type(piece)(piece.store.map(torch.clone), piece.shape, piece.dtype)


def _to_copy(
    piece: CompactTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    if not piece.is_whole:
        return piece.to_dense().to(dtype=dtype, device=device, non_blocking=non_blocking)

    def move(t: Tensor) -> Tensor:
        return t.to(device or t.device, copy=True, non_blocking=non_blocking)

    return type(piece)(piece.store.map(move), piece.shape, dtype or piece.dtype)


def _new_empty(
    piece: CompactTensor,
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """A new tensor: compact and :class:`Blank` if it has no elements or ``piece`` is blank.

    Otherwise it is dense, as any caller but DeepSpeed's offloading (see ``Blank``) will fill it.
    """
    dtype, device, numel = dtype or piece.dtype, device or piece.device, math.prod(size)
    if numel and not isinstance(piece.store, Blank):
        return torch.empty(size, dtype=dtype, device=device, pin_memory=bool(pin_memory))
    return type(piece)(Blank(numel, device, bool(pin_memory)), tuple(size), dtype)


def _copy(into: CompactTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Take over a copy of another whole tensor's store, or write dense elements.

    Args:
        into: the tensor to change.
        source: the tensor to copy from, compact or dense; broadcast to the shape of ``into``.
        non_blocking: as for ``torch.Tensor.copy_``; used for copies to a blank tensor only.

    Raises:
        NotImplementedError: the compact form of ``into`` cannot hold the elements of ``source``.
    """
    store, blank = None, into.store
    if isinstance(source, CompactTensor) and type(source) is type(into):
        if source.shape == into.shape and source.is_whole:
            store = source.store
    if store is not None and isinstance(blank, Blank):

        def pinned(t: Tensor) -> Tensor:
            made = torch.empty(t.shape, dtype=t.dtype, device=blank.device, pin_memory=blank.pinned)
            return made.copy_(t, non_blocking=non_blocking)

        into.store = store.map(pinned)
    elif store is not None and into.is_whole:
        device = into.device
        _become(into.store, store.map(lambda t: t.to(device, copy=True)))
    elif isinstance(blank, Blank):
        raise NotImplementedError(into.no_writes.format("copy_"))
    else:
        dense = source.to_dense() if isinstance(source, CompactTensor) else source
        into.write(dense.expand(into.shape).reshape(-1))
    return into


def _become(store: Any, other: Any) -> None:
    """Give a store the content of another one, for all tensors that share it.

    ``torch.distributed.checkpoint`` needs this: it loads by ``copy_`` to a detached alias of the
    state.
    """
    for field in fields(store):
        setattr(store, field.name, getattr(other, field.name))


def _pin_memory(piece: _C, *_: Any) -> _C:
    return type(piece)(piece.store.map(Tensor.pin_memory), piece.shape, piece.dtype)


def _is_pinned(piece: CompactTensor, *_: Any) -> bool:
    # DeepSpeed asks when it ends, to unpin what it pinned; torch itself frees a store's memory.
    return False


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.slice.Tensor: _slice,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.new_empty.default: _new_empty,
    _aten.copy_.default: _copy,
    _aten._pin_memory.default: _pin_memory,
    _aten.is_pinned.default: _is_pinned,
}
