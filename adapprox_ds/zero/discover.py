# SPDX-License-Identifier: Apache-2.0
"""Reads off DeepSpeed's objects which parameter lies where in each flat shard.

One function a wrapper (what differs between releases of DeepSpeed is in compat.py):

* ``DeepSpeedZeroOptimizer`` (ZeRO-1, ZeRO-2) and ``BF16_Optimizer``: a group's parameters lie end
  to end in one flat tensor; a rank owns one of ``world`` equal parts of it.
* ``DeepSpeedZeroOptimizer_Stage3``: each parameter is split evenly over the ranks into slots; a
  sub-group's slots of one rank lie end to end.
* ``FP16_UnfusedOptimizer`` (stage 0): one fp32 clone a parameter.

Layouts are exact as read, and verified all the same: a shard's slices must equal the model's
low-precision parameters, else it is never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.shards import Shard, ShardLayouts
from adapprox_ds.zero.compat import offsets_of_group
from adapprox_ds.zero.configuration import refuse_wrapper
from adapprox_ds.zero.handshake import collective_device

#: ZeRO-1/2 pads a group to a multiple of this times the world size
#: (stage_1_and_2.py, nccl_start_alignment_factor).
START_ALIGNMENT = 2
_REBUILD = (
    "build it by adapprox_ds.initialize, or give deepspeed.initialize a callable that builds it"
)


def from_wrapper(wrapper: Any, table: ShardLayouts) -> list[Shard]:
    """The verified shards of a DeepSpeed wrapper (``engine.optimizer``), from its own tables.

    Args:
        wrapper: any wrapper of stages 0 to 3.
        table: the parameter groups as the optimizer was given them. Their names are used, not
            DeepSpeed's, so that a parameter's random stream does not depend on how it was found.

    Raises:
        RuntimeError: the wrapper cannot work with a factored state, a shard does not hold what
            its tables say, or a parameter is unknown.
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
            ranks = groups[0] if groups else getattr(wrapper, "dp_process_group", None)
            verify(shards, table.owner, ranks)
            return shards
    raise RuntimeError(
        f"{table.owner} does not know DeepSpeed's {type(wrapper).__name__}; known: "
        f"{', '.join(kind.__name__ for kind in readers)}"
    )


class Recorded:
    """Names and groups of parameters: as recorded, else (replaced modules) by DeepSpeed's names.

    Args:
        table: the parameter groups as the optimizer was given them.
        wrapper_names: DeepSpeed's name of each parameter, or None.
    """

    def __init__(self, table: ShardLayouts, wrapper_names: Any = None) -> None:
        self._owner, self._wrapper_names = table.owner, wrapper_names
        self._names: dict[int, str] = {}
        self._groups: dict[int | str, int] = {}
        for number, group in enumerate(table.recorded):
            for entry in group:
                self._names[id(entry.param)] = entry.name
                self._groups[id(entry.param)] = self._groups[entry.name] = number

    def name(self, param: Tensor) -> str:
        """Of a parameter of DeepSpeed's.

        Raises:
            RuntimeError: it is unknown.
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
        """The recorded group that holds the parameters of one of DeepSpeed's.

        Raises:
            RuntimeError: none does, or more than one.
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


def rank_in(group: Any) -> int:
    """This rank's number in a process group."""
    from deepspeed import comm

    return int(comm.get_rank(group=group))


def cut(
    params: Sequence[Tensor], offsets: Sequence[int], begin: int, size: int, known: Recorded
) -> list[tuple[ParamFragment, Tensor]]:
    """The parts of parameters at ``offsets`` of a group that lie in [begin, begin + size)."""
    sources = []
    for p, offset in zip(params, offsets, strict=True):
        lo, hi = max(offset, begin), min(offset + p.numel(), begin + size)
        if lo < hi:
            name, shape = known.name(p), tuple(p.shape)
            fragment = ParamFragment(name, shape, lo - offset, hi - lo, lo - begin)
            sources.append((fragment, p))
    return sources


def offsets_of(params: Sequence[Tensor], alignment: int = 1) -> list[int]:
    """Where each parameter starts when laid end to end, each start rounded up to ``alignment``."""
    offsets, end = [], 0
    for p in params:
        start = -(-end // alignment) * alignment
        offsets.append(start)
        end = start + p.numel()
    return offsets


def _read_zero12(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        ranks = wrapper.real_dp_process_group[i]
        begin = rank_in(ranks) * flat.numel()
        params, offsets = wrapper.round_robin_bit16_groups[i], offsets_of_group(wrapper, i)
        sources = cut(params, offsets, begin, flat.numel(), known)
        shards.append(Shard.of(flat, known.group(params), sources, ranks=ranks))
    return shards


def _read_bf16(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_groups_flat_partition):
        ranks = wrapper.real_dp_process_group[i]
        begin = rank_in(ranks) * flat.numel()
        params = wrapper.bf16_groups[i]
        sources = cut(params, offsets_of(params), begin, flat.numel(), known)
        shards.append(Shard.of(flat, known.group(params), sources, ranks=ranks))
    return shards


def _read_zero3(wrapper: Any, known: Recorded) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        sources, offset = [], 0
        for p in wrapper.fp16_groups[i]:
            slot = p.partition_numel()
            start = rank_in(p.ds_process_group) * slot
            # The last rank's slot ends in memory that nobody initialised.
            numel = min(slot, p.ds_numel - start)
            if numel > 0:
                shape = tuple(p.ds_shape)
                sources.append((ParamFragment(known.name(p), shape, start, numel, offset), p))
            offset += slot
        params = wrapper.fp16_groups[i]
        ranks = params[0].ds_process_group
        shards.append(Shard.of(flat, known.group(params), sources, ranks=ranks))
    return shards


def _read_unfused(wrapper: Any, known: Recorded) -> list[Shard]:
    return [
        clone_of(clone, p, known)
        for clones, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for clone, p in zip(clones, params, strict=True)
    ]


def clone_of(clone: Tensor, p: Tensor, known: Recorded) -> Shard:
    """The shard that a parameter's fp32 clone is."""
    fragment = ParamFragment(known.name(p), tuple(p.shape), 0, p.numel(), 0)
    return Shard.of(clone, known.group([p]), [(fragment, p)], is_clone=True)


def numbers_now(
    wrapper: Any, optimizer: torch.optim.Optimizer, shards: Iterable[Shard]
) -> dict[int, int]:
    """By a shard's group as recorded: where it is among the optimizer's groups now.

    DeepSpeed drops empty groups, and checkpoints count the others.
    """
    places = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if hasattr(wrapper, "sub_group_to_group_id"):
        flats = enumerate(wrapper.fp32_partitioned_groups_flat)
        places = {flat: wrapper.sub_group_to_group_id[i] for i, flat in flats}
    return {shard.group: places[shard.flat] for shard in shards}


def all_ranks(verdict: bool, dp_group: Any) -> bool:
    """Whether the verdict is True on every rank of the group."""
    from deepspeed import comm

    vote = torch.tensor([int(verdict)], dtype=torch.int64, device=collective_device(dp_group))
    comm.all_reduce(vote, op=comm.ReduceOp.MIN, group=dp_group)
    return bool(vote.item())


def _reference(fragment: ParamFragment, p: Tensor) -> Tensor | None:
    """The low-precision values that a fragment must equal; None while they are not in memory."""
    if hasattr(p, "ds_tensor"):
        held = p.ds_tensor
        return held.detach().view(-1)[: fragment.numel] if held.numel() else None
    return p.detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]


def first_mismatch(
    flat: Tensor | None, sources: Iterable[tuple[ParamFragment, Tensor]]
) -> ParamFragment | None:
    """The first fragment whose values are not its parameter's; None where all are.

    Compared in the lower precision of the two: master weights may be in bf16, parameters in fp32.
    """
    for fragment, p in sources:
        if flat is None or fragment.offset + fragment.numel > flat.numel():
            return fragment
        reference = _reference(fragment, p)
        if reference is None:
            continue
        held = flat.detach()[fragment.offset : fragment.offset + fragment.numel]
        dtype = max(held.dtype, reference.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        held, reference = held.to(reference.device, dtype), reference.to(dtype)
        if not torch.allclose(held, reference, rtol=0.0, atol=0.0, equal_nan=True):
            return fragment
    return None


def verify(shards: Iterable[Shard], owner: str, dp_group: Any = None) -> None:
    """Compare each slice with its parameter's low-precision copy; all ranks raise or none does.

    Args:
        shards: of this rank.
        owner: the optimizer's name.
        dp_group: the ranks that check together; None where each rank holds whole parameters.

    Raises:
        RuntimeError: names the first parameter that is not where the tables say.
    """
    shards = list(shards)
    message = ""
    for shard in shards:
        bad = first_mismatch(shard.flat.detach().reshape(-1), shard.sources)
        if bad is not None:
            message = (
                f"the shard of group {shard.group} does not hold parameter {bad.name!r} at "
                f"[{bad.offset}, {bad.offset + bad.numel}) as DeepSpeed's tables say"
            )
            break
    agreed = not message
    if dp_group is not None:
        agreed = all_ranks(agreed, dp_group)
    if not agreed:
        raise RuntimeError(
            f"{message or 'another rank does not hold what the tables say'}; {owner} will "
            "not train on it. Were the weights changed after deepspeed.initialize? Load them "
            "before it, or through engine.load_checkpoint"
        )
