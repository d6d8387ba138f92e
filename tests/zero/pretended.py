# SPDX-License-Identifier: Apache-2.0
"""A pretended accelerator, "gpu", whose numbers lie on the CPU, and NCCL's rules for collectives.

Operations on its tensors run on the CPU, of tensors that lie there: to mix both is an error, as on
a GPU. Process groups of gloo pass for NCCL's, which take tensors of the accelerator alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import adapprox_ds
from adapprox_ds.adapprox.factors import FactorStore
from adapprox_ds.core import inputs

PACKAGE = Path(adapprox_ds.__file__).parent
#: Device of the accelerator.
KIND = "gpu"
#: What ncclDataType of torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp has, but for booleans,
#: which it sends as bytes and refuses to average.
NCCL_DTYPES = frozenset(
    {torch.int8, torch.uint8, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
#: Operations between devices: what each rank sends, or gets.
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_MOVES |= {torch.ops.aten._foreach_copy_.default}


class OnDevice(Tensor):
    """A tensor of the pretended accelerator."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=f"{KIND}:0",
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU; its results lie where it was asked for."""
    if func is torch.ops.aten._pin_memory.default:
        return args[0]
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, OnDevice) for x in given)
    # Numbers may be on the host.
    here = any(not isinstance(x, OnDevice) and x.dim() for x in given)
    assert not (there and here) or func in _MOVES, f"{func} of tensors on the CPU and on {KIND}"
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == KIND
        kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten._to_copy.default:
            return _wrapped(func(*tree_map(_held, args), **kwargs).clone(), there)
    elif func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], OnDevice)
    made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return tree_map(lambda x: _wrapped(x, there), made)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _wrapped(x: Any, there: bool) -> Any:
    return OnDevice(x) if there and isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


class _Mode(TorchDispatchMode):
    """Runs all operations, and holds the package's collectives to the rules.

    Attributes:
        sites: "module.function" of each that was seen, and what it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._watch(func, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        for kind in types:
            if not issubclass(kind, OnDevice | torch.nn.Parameter) and kind is not Tensor:
                with self:  # what a compact moment makes of it
                    return kind.__torch_dispatch__(func, types, args, kwargs)
        return _run(func, args, kwargs)

    def _watch(self, func: Any, given: list[Tensor]) -> None:
        site, of_objects = _caller()
        if site is None:
            return
        kinds = self.sites.setdefault(site, set())
        for x in given:
            kinds.add(x.dtype)
            # Where pickled objects go torch itself decides, by the group that it knows better.
            assert of_objects or isinstance(x, OnDevice), (
                f"{site}: {func} of a tensor on {x.device}"
            )
            assert x.is_contiguous(), f"{site}: {func} of strides {x.stride()}"
            assert x.dtype in NCCL_DTYPES, f"{site}: {func} of {x.dtype}"


def _caller() -> tuple[str | None, bool]:
    """The function of the package that asks for a collective, if one does; whether of objects."""
    frame, of_objects = sys._getframe(1), False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        of_objects |= frame.f_code.co_name.endswith("_object")
        if path.is_relative_to(PACKAGE):
            module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
            return f"{module}.{frame.f_code.co_name}", of_objects
        wraps = {"torch", "comm", "utils", "contextlib.py"} & set(path.parts[-3:] + path.parts)
        if not wraps and path != Path(__file__):
            return None, of_objects
        frame = frame.f_back
    return None, of_objects


class _Event:
    """Of a device on which all is done at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Backends(dict):
    """Of process groups, each NCCL's."""

    def get(self, group: Any, default: Any = None) -> Any:
        return f"{KIND}:nccl"

    __getitem__ = get


@contextmanager
def accelerator() -> Iterator[_Mode]:
    """A process with the accelerator, whose groups are NCCL's. One that was so once stays aware."""
    if not hasattr(torch, KIND):
        _setup_privateuseone_for_python_backend(KIND)
    world = distributed_c10d._world
    with ExitStack() as stack:
        backends = _Backends(world.pg_backend_config)
        stack.enter_context(mock.patch.object(type(world), "pg_backend_config", backends))
        stack.enter_context(mock.patch.object(distributed, "get_backend", lambda _=None: "nccl"))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: self))
        stack.enter_context(mock.patch.object(torch, "Event", _Event))
        # What refuses tensors whose elements lie in others', as these do.
        stack.enter_context(mock.patch.object(FactorStore, "require_fit", lambda *_: None))
        stack.enter_context(mock.patch.object(inputs, "_require_plain", lambda *_: None))
        # torch.tensor makes its numbers on the CPU, and sends them where the mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(_Mode())
