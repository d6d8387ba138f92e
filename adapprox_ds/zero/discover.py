# SPDX-License-Identifier: Apache-2.0
"""Reads from DeepSpeed's objects which part of which parameter lies where in each shard.

There is one function for each of DeepSpeed's wrappers of an optimizer:

* ``DeepSpeedZeroOptimizer`` (ZeRO-1, ZeRO-2) and ``BF16_Optimizer``: the parameters of a group lie
  end to end in one flat tensor, and each process owns one of ``world`` equal parts of it.
* ``DeepSpeedZeroOptimizer_Stage3``: each parameter is split into slots of one size, one for each
  process. A process's slots of the parameters of a sub-group lie end to end in its flat tensor.
* ``FP16_UnfusedOptimizer`` (stage 0): each parameter has an fp32 clone.

Each layout is also verified: the fragments in a shard must equal the model's parameters in the
lower of the two precisions. Otherwise the optimizer refuses to train on the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.shards import Shard, ShardTable
from adapprox_ds.zero.compat import offsets_of_group
from adapprox_ds.zero.configuration import refuse_wrapper
from adapprox_ds.zero.handshake import any_process
from adapprox_ds.zero.norms import norm_of_wrapper

_REBUILD = (
    "build it by adapprox_ds.initialize, or give deepspeed.initialize a callable that builds it"
)


def from_wrapper(wrapper: Any, table: ShardTable[Any]) -> list[Shard]:
    """The verified shards of a DeepSpeed wrapper (``engine.optimizer``), read from its tables.

    Args:
        wrapper: a wrapper of any of the stages 0 to 3.
        table: the table of the optimizer, with the parameters that it was built from. Fragments get
            the names of the table and not DeepSpeed's, so that the random numbers of a parameter do
            not depend on how its shard was found.

    Raises:
        RuntimeError: the wrapper is of a kind that cannot work or is not known, a shard does not
            contain what the wrapper's tables say, or a parameter is none of the table's.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    refuse_wrapper(wrapper, table.owner)
    known = Recorded(table, getattr(wrapper, "param_names", None))
    readers: dict[type, Callable[[Any, Recorded], list[Shard]]] = {
        DeepSpeedZeroOptimizer_Stage3: _read_zero3,
        DeepSpeedZeroOptimizer: _read_zero12,
        BF16_Optimizer: _read_bf16,
        FP16_UnfusedOptimizer: _read_unfused,
    }
    for kind, read in readers.items():
        if isinstance(wrapper, kind):
            shards = read(wrapper, known)
            groups = getattr(wrapper, "real_dp_process_group", None)
            dp_group = groups[0] if groups else getattr(wrapper, "dp_process_group", None)
            verify(shards, table.owner, dp_group)
            return shards
    raise RuntimeError(
        f"{table.owner} does not know DeepSpeed's {type(wrapper).__name__}; known: "
        f"{', '.join(kind.__name__ for kind in readers)}"
    )


def adopt(wrapper: Any, table: ShardTable[Any], group: Any) -> None:
    """Let a table adopt what :func:`from_wrapper` reads, and set the functions of its checks.

    ``group`` is torch's group of the processes that share the shards; None where it is not known.
    """
    table.adopt(from_wrapper(wrapper, table))
    table.norm = norm_of_wrapper(wrapper, table, group)
    if group is not None:
        table.agree = partial(any_process, group=group)


class Recorded:
    """Looks up names and groups of DeepSpeed's parameters in an optimizer's table.

    A parameter that DeepSpeed put in the place of a recorded one is found by DeepSpeed's name.

    Args:
        table: the table of the optimizer, with the parameters that it was built from.
        wrapper_names: DeepSpeed's name of each parameter; None where there are none.
    """

    def __init__(self, table: ShardTable[Any], wrapper_names: Any = None) -> None:
        self._owner, self._wrapper_names = table.owner, wrapper_names
        self._names: dict[int, str] = {}
        self._groups: dict[int | str, int] = {}
        for number, group in enumerate(table.recorded):
            for entry in group:
                self._names[id(entry.param)] = entry.name
                self._groups[id(entry.param)] = self._groups[entry.name] = number

    def name(self, param: Tensor) -> str:
        """The name of one of DeepSpeed's parameters.

        Raises:
            RuntimeError: the optimizer was not built from it.
        """
        if id(param) in self._names:
            return self._names[id(param)]
        if self._wrapper_names is not None and param in self._wrapper_names:
            return str(self._wrapper_names[param])
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} in DeepSpeed's groups is none that "
            f"{self._owner} was built from; {_REBUILD}"
        )

    def group(self, params: Sequence[Tensor]) -> int:
        """The index of the recorded group that the parameters of one of DeepSpeed's groups are in.

        Raises:
            RuntimeError: they are in no recorded group, or in more than one.
        """
        names = [self.name(p) for p in params]
        keys: list[int | str] = [id(p) if id(p) in self._names else self.name(p) for p in params]
        found = {self._groups[key] for key in keys if key in self._groups}
        if len(found) == 1:
            return found.pop()
        raise RuntimeError(
            f"a group of DeepSpeed's with {names[0]!r} holds parameters of {len(found)} groups "
            f"that {self._owner} was built from, where it should of one; {_REBUILD}"
        )


def process_number(group: Any) -> int:
    """The number of this process in a process group, from 0."""
    from deepspeed import comm

    return int(comm.get_rank(group=group))


def fragments_between(
    params: Sequence[Tensor], offsets: Sequence[int], begin: int, size: int, known: Recorded
) -> list[tuple[ParamFragment, Tensor]]:
    """The fragments of a group's parameters that lie in one part of the group's flat tensor.

    Args:
        params: the parameters of the group.
        offsets: the offset of each parameter in the group's flat tensor.
        begin: the offset of the part's first element in the group's flat tensor.
        size: the length of the part.
        known: gives the parameters' names.

    Returns:
        Each fragment, with an offset in the part, and the parameter that it is a part of.
    """
    sources = []
    for p, offset in zip(params, offsets, strict=True):
        lo, hi = max(offset, begin), min(offset + p.numel(), begin + size)
        if lo < hi:
            name, shape = known.name(p), tuple(p.shape)
            fragment = ParamFragment(name, shape, lo - offset, hi - lo, lo - begin)
            sources.append((fragment, p))
    return sources


def offsets_of(params: Sequence[Tensor], alignment: int = 1) -> list[int]:
    """The offsets of parameters that lie end to end, each offset rounded up to ``alignment``."""
    offsets, end = [], 0
    for p in params:
        start = -(-end // alignment) * alignment
        offsets.append(start)
        end = start + p.numel()
    return offsets


def _read_zero12(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        dp_group = wrapper.real_dp_process_group[i]
        begin = process_number(dp_group) * flat.numel()
        params, offsets = wrapper.round_robin_bit16_groups[i], offsets_of_group(wrapper, i)
        sources = fragments_between(params, offsets, begin, flat.numel(), known)
        shards.append(Shard.of(flat, known.group(params), sources, process_group=dp_group))
    return shards


def _read_bf16(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_groups_flat_partition):
        dp_group = wrapper.real_dp_process_group[i]
        begin = process_number(dp_group) * flat.numel()
        params = wrapper.bf16_groups[i]
        sources = fragments_between(params, offsets_of(params), begin, flat.numel(), known)
        shards.append(Shard.of(flat, known.group(params), sources, process_group=dp_group))
    return shards


def _read_zero3(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        sources, offset = [], 0
        for p in wrapper.fp16_groups[i]:
            slot = p.partition_numel()
            start = process_number(p.ds_process_group) * slot
            # The slot of the last process ends in memory that is not initialised.
            numel = min(slot, p.ds_numel - start)
            if numel > 0:
                shape = tuple(p.ds_shape)
                sources.append((ParamFragment(known.name(p), shape, start, numel, offset), p))
            offset += slot
        params = wrapper.fp16_groups[i]
        dp_group = params[0].ds_process_group
        shards.append(Shard.of(flat, known.group(params), sources, process_group=dp_group))
    return shards


def _read_unfused(wrapper: Any, known: Recorded) -> list[Shard]:
    return [
        clone_of(clone, p, known)
        for clones, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for clone, p in zip(clones, params, strict=True)
    ]


def clone_of(clone: Tensor, p: Tensor, known: Recorded) -> Shard:
    """A parameter's fp32 clone as a shard."""
    fragment = ParamFragment(known.name(p), tuple(p.shape), 0, p.numel(), 0)
    return Shard.of(clone, known.group([p]), [(fragment, p)], is_clone=True)


def present_groups(
    wrapper: Any, optimizer: torch.optim.Optimizer, shards: Iterable[Shard]
) -> dict[int, int]:
    """The present index of each recorded group of which there is a shard.

    DeepSpeed removes groups without parameters from ``param_groups``, and checkpoints have the
    others only.

    Args:
        wrapper: ``engine.optimizer``.
        optimizer: the optimizer that it wraps, or the same one.
        shards: the shards of this process.

    Returns:
        For each ``Shard.group`` the index in the optimizer's ``param_groups``.
    """
    places = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if hasattr(wrapper, "sub_group_to_group_id"):
        flats = enumerate(wrapper.fp32_partitioned_groups_flat)
        places = {flat: wrapper.sub_group_to_group_id[i] for i, flat in flats}
    return {shard.group: places[shard.flat] for shard in shards}


def all_processes(verdict: bool, dp_group: Any) -> bool:
    """Whether a verdict is True on every process of a group; a collective call."""
    against = torch.tensor(float(not verdict), dtype=torch.float32, device="cpu")
    return not any_process(against, dp_group).item()


def _reference(fragment: ParamFragment, p: Tensor) -> Tensor | None:
    """The model's values of a fragment, (numel,); None while they are not in memory."""
    if hasattr(p, "ds_tensor"):
        held = p.ds_tensor
        return held.detach().view(-1)[: fragment.numel] if held.numel() else None
    return p.detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]


def first_mismatch(
    flat: Tensor | None, sources: Iterable[tuple[ParamFragment, Tensor]]
) -> ParamFragment | None:
    """The first fragment whose values are not those of its parameter; None where all are equal.

    They are compared in the dtype of less precision, which is not always the parameter's: master
    weights may be in bf16 and parameters in fp32.

    Args:
        flat: the shard, 1-D; None where this process does not know one.
        sources: the fragments, each with its parameter.
    """
    for fragment, p in sources:
        if flat is None or fragment.end > flat.numel():
            return fragment
        reference = _reference(fragment, p)
        if reference is None:
            continue
        held = fragment.view(flat.detach())
        dtype = max(held.dtype, reference.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        held, reference = held.to(reference.device, dtype), reference.to(dtype)
        if not torch.allclose(held, reference, rtol=0.0, atol=0.0, equal_nan=True):
            return fragment
    return None


def verify(shards: Iterable[Shard], owner: str, dp_group: Any = None) -> None:
    """Compare each fragment with the model's parameter; all processes raise, or none does.

    Args:
        shards: the shards of this process.
        owner: the optimizer's name.
        dp_group: the group of processes that check together, by a collective call; None where each
            process has whole parameters.

    Raises:
        RuntimeError: a fragment differs; the message names the first such parameter.
    """
    shards = list(shards)
    message = ""
    for shard in shards:
        bad = first_mismatch(shard.flat.detach().reshape(-1), shard.sources)
        if bad is not None:
            message = (
                f"the shard of group {shard.group} does not hold parameter {bad.name!r} at "
                f"[{bad.offset}, {bad.end}) as DeepSpeed's tables say"
            )
            break
    agreed = not message
    if dp_group is not None:
        agreed = all_processes(agreed, dp_group)
    if not agreed:
        raise RuntimeError(
            f"{message or 'a shard of another process does not hold what it should'}; {owner} will "
            "not train on it. Were the weights changed after deepspeed.initialize? Load them "
            "before it, or through engine.load_checkpoint"
        )
