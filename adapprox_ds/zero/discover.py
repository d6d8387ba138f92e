# SPDX-License-Identifier: Apache-2.0
"""Reads off DeepSpeed's objects which parameter lies where in each flat shard.

One function a wrapper (facts of DeepSpeed 0.19):

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.optim.shards import ShardLayouts
from adapprox_ds.zero.configuration import refuse_wrapper
from adapprox_ds.zero.layout import NamedParameter, ParamFragment, ShardLayout

#: ZeRO-1/2 pads a group to a multiple of this times the world size
#: (stage_1_and_2.py, nccl_start_alignment_factor).
_START_ALIGNMENT = 2

Namer = Callable[[Tensor], str]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One flat tensor of this rank.

    Attributes:
        flat: the tensor the optimizer is stepped with.
        group: index of its parameter group.
        layout: what lies where in it.
        sources: each fragment with the parameter it is a part of.
        is_clone: whether it is a whole parameter's fp32 clone (stage 0).
        ranks: the process group that it is partitioned over; None where that is not known, or
            where nothing is partitioned.
    """

    flat: Tensor
    group: int
    layout: ShardLayout
    sources: tuple[tuple[ParamFragment, Tensor], ...]
    is_clone: bool = False
    ranks: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters in it."""
        return tuple(part.fragment.name for part in self.layout.fragments)

    @classmethod
    def of(
        cls,
        flat: Tensor,
        group: int,
        sources: Iterable[tuple[ParamFragment, Tensor]],
        is_clone: bool = False,
        ranks: Any = None,
    ) -> Shard:
        """Build the layout of ``flat`` from its fragments."""
        pairs = tuple(sources)
        layout = ShardLayout.build([fragment for fragment, _ in pairs], flat.numel())
        return cls(flat, group, layout, pairs, is_clone, ranks)


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
    names = _namer(table, getattr(wrapper, "param_names", None))
    readers: dict[type, Callable[[Any, Namer], list[Shard]]] = {
        DeepSpeedZeroOptimizer_Stage3: _read_zero3,
        DeepSpeedZeroOptimizer: _read_zero12,
        BF16_Optimizer: _read_bf16,
        FP16_UnfusedOptimizer: _read_unfused,
    }
    for kind, read in readers.items():
        if isinstance(wrapper, kind):
            shards = read(wrapper, names)
            groups = getattr(wrapper, "real_dp_process_group", None)
            ranks = groups[0] if groups else getattr(wrapper, "dp_process_group", None)
            verify(shards, table.owner, ranks)
            return shards
    raise RuntimeError(
        f"{table.owner} does not know DeepSpeed's {type(wrapper).__name__}; known: "
        f"{', '.join(kind.__name__ for kind in readers)}"
    )


def _namer(table: ShardLayouts, wrapper_names: Any) -> Namer:
    """A function from parameter to name: as recorded, else (replaced modules) DeepSpeed's."""
    names = {id(entry.param): entry.name for group in table.recorded for entry in group}

    def name(param: Tensor) -> str:
        if id(param) in names:
            return names[id(param)]
        if wrapper_names is not None and param in wrapper_names:
            return str(wrapper_names[param])
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} in DeepSpeed's groups is none that "
            f"{table.owner} was built from; build it by adapprox_ds.initialize, or give "
            "deepspeed.initialize a callable that builds it"
        )

    return name


def _rank(group: Any) -> int:
    from deepspeed import comm

    return int(comm.get_rank(group=group))


def _cut(
    params: Sequence[Tensor], offsets: Sequence[int], begin: int, size: int, names: Namer
) -> list[tuple[ParamFragment, Tensor]]:
    """The parts of parameters at ``offsets`` of a group that lie in [begin, begin + size)."""
    sources = []
    for p, offset in zip(params, offsets, strict=True):
        lo, hi = max(offset, begin), min(offset + p.numel(), begin + size)
        if lo < hi:
            fragment = ParamFragment(names(p), tuple(p.shape), lo - offset, hi - lo, lo - begin)
            sources.append((fragment, p))
    return sources


def _offsets(params: Sequence[Tensor], alignment: int = 1) -> list[int]:
    """Where each parameter starts when laid end to end, each start rounded up to ``alignment``."""
    offsets, end = [], 0
    for p in params:
        start = -(-end // alignment) * alignment
        offsets.append(start)
        end = start + p.numel()
    return offsets


def _read_zero12(wrapper: Any, names: Namer) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        ranks = wrapper.real_dp_process_group[i]
        begin = _rank(ranks) * flat.numel()
        params, offsets = wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i]
        sources = _cut(params, offsets, begin, flat.numel(), names)
        shards.append(Shard.of(flat, i, sources, ranks=ranks))
    return shards


def _read_bf16(wrapper: Any, names: Namer) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_groups_flat_partition):
        ranks = wrapper.real_dp_process_group[i]
        begin = _rank(ranks) * flat.numel()
        params = wrapper.bf16_groups[i]
        sources = _cut(params, _offsets(params), begin, flat.numel(), names)
        shards.append(Shard.of(flat, i, sources, ranks=ranks))
    return shards


def _read_zero3(wrapper: Any, names: Namer) -> list[Shard]:
    shards = []
    for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        sources, offset = [], 0
        for p in wrapper.fp16_groups[i]:
            slot = p.partition_numel()
            start = _rank(p.ds_process_group) * slot
            # The last rank's slot ends in memory that nobody initialised.
            numel = min(slot, p.ds_numel - start)
            if numel > 0:
                shape = tuple(p.ds_shape)
                sources.append((ParamFragment(names(p), shape, start, numel, offset), p))
            offset += slot
        ranks = wrapper.fp16_groups[i][0].ds_process_group
        shards.append(Shard.of(flat, wrapper.sub_group_to_group_id[i], sources, ranks=ranks))
    return shards


def _read_unfused(wrapper: Any, names: Namer) -> list[Shard]:
    return [
        _clone_of(clone, p, i, names)
        for i, (clones, params) in enumerate(
            zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        )
        for clone, p in zip(clones, params, strict=True)
    ]


def _clone_of(clone: Tensor, p: Tensor, group: int, names: Namer) -> Shard:
    fragment = ParamFragment(names(p), tuple(p.shape), 0, p.numel(), 0)
    return Shard.of(clone, group, [(fragment, p)], is_clone=True)


def sharing_ranks(recorded: Sequence[Sequence[NamedParameter]]) -> Any:
    """The process group that shares the shards, as far as the parameters tell; else None."""
    params: Iterable[Any] = (entry.param for group in recorded for entry in group)
    for p in params:
        if hasattr(p, "_z3_optimizer"):
            return p._z3_optimizer.dp_process_group
        if hasattr(p, "_dp_group"):
            return p._dp_group
    return None


def from_parameters(table: ShardLayouts, strangers: Sequence[Tensor]) -> list[Shard]:
    """The verified shards as far as the recorded parameters tell, when nobody called ``attach``.

    Called in the first step of every rank at once: ranks agree on the outcome by an all-reduce a
    parameter group.

    Args:
        table: the parameter groups as the optimizer was given them.
        strangers: tensors in the groups now that are no recorded parameters.

    Raises:
        RuntimeError: the parameters do not tell, or no candidate layout holds what it should.
    """
    recorded = table.recorded
    params = [entry.param for group in recorded for entry in group]
    for attribute in ("_z3_optimizer", "_zero_optimizer"):
        for p in params:
            if (wrapper := getattr(p, attribute, None)) is not None:
                return from_wrapper(wrapper, table)
    if any(hasattr(p, "_hp_mapping") for p in params):
        names = _namer(table, None)
        found = (_read_mapping(g, recorded[g], names) for g in range(len(recorded)))
        return [shard for shard in found if shard is not None]
    trainable = [
        (entry.param, g)
        for g, group in enumerate(recorded)
        for entry in group
        if entry.param.requires_grad and entry.param.numel()
    ]
    if [p.shape for p, _ in trainable] == [clone.shape for clone in strangers]:
        names = _namer(table, None)
        shards = [_clone_of(c, p, g, names) for c, (p, g) in zip(strangers, trainable, strict=True)]
        verify(shards, table.owner)
        return shards
    raise RuntimeError(
        f"{table.owner} was stepped with {len(strangers)} tensors that are not the parameters it "
        "was built from, and these do not tell what lies in them; call adapprox_ds.attach(engine) "
        "after deepspeed.initialize, or use adapprox_ds.initialize"
    )


def _read_mapping(index: int, group: Sequence[NamedParameter], names: Namer) -> Shard | None:
    """A ZeRO-1/2 or BF16_Optimizer shard from its parameters' ``_hp_mapping``.

    With round_robin_gradients DeepSpeed links the mapping in the wrong order (seen in 0.19.8).
    Where the data say so, the orders that DeepSpeed can lay parameters in are tried in turn.
    """
    params: list[Any] = [entry.param for entry in group if hasattr(entry.param, "_hp_mapping")]
    mapped = [(p, p._hp_mapping) for p in params if p._hp_mapping is not None]
    if not params:
        return None
    dp_group = params[0]._dp_group
    flat = mapped[0][1].hp_fragment._base if mapped else None
    sources = []
    for p, mapping in mapped:
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        fragment = ParamFragment(names(p), tuple(p.shape), lp.start, lp.numel, hp.start)
        sources.append((fragment, p))
    if _all_ranks(_first_mismatch(flat, sources) is None, dp_group):
        return None if flat is None else Shard.of(flat, index, sources)
    for sources in _candidates(params, flat, dp_group, names):
        if _all_ranks(_first_mismatch(flat, sources) is None, dp_group):
            return None if flat is None else Shard.of(flat, index, sources)
    raise RuntimeError(
        f"no known order of the parameters of group {index} matches what its ZeRO shard holds; "
        "call adapprox_ds.attach(engine) after deepspeed.initialize, or use "
        "adapprox_ds.initialize"
    )


def _candidates(
    params: Sequence[Tensor], flat: Tensor | None, dp_group: Any, names: Namer
) -> Iterable[list[tuple[ParamFragment, Tensor]]]:
    """Fragments for every order and alignment in which ZeRO-1/2 can lay out a group."""
    from deepspeed import comm

    world = comm.get_world_size(group=dp_group)
    element_alignment = max(1, 16 // params[0].element_size())
    for order in (list(params), [p for j in range(world) for p in params[j::world]]):
        for alignment in (1, element_alignment):
            offsets = _offsets(order, alignment)
            unit = _START_ALIGNMENT * world
            size = -(-(offsets[-1] + order[-1].numel()) // unit) * unit // world
            if flat is not None:
                size = flat.numel()
            sources = _cut(order, offsets, _rank(dp_group) * size, size, names)
            # A rank that DeepSpeed linked no parameter to cannot hold one under this candidate.
            yield sources


def _all_ranks(verdict: bool, dp_group: Any) -> bool:
    """Whether the verdict is True on every rank of the group."""
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    # With offload, shards are not on the device that collectives run on.
    device = get_accelerator().current_device_name()
    vote = torch.tensor([int(verdict)], dtype=torch.int64, device=device)
    comm.all_reduce(vote, op=comm.ReduceOp.MIN, group=dp_group)
    return bool(vote.item())


def _reference(fragment: ParamFragment, p: Tensor) -> Tensor | None:
    """The low-precision values that a fragment must equal; None while they are not in memory."""
    if hasattr(p, "ds_tensor"):
        held = p.ds_tensor
        return held.detach().view(-1)[: fragment.numel] if held.numel() else None
    return p.detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]


def _first_mismatch(
    flat: Tensor | None, sources: Iterable[tuple[ParamFragment, Tensor]]
) -> ParamFragment | None:
    """The first fragment whose values are not its parameter's; None where all are."""
    for fragment, p in sources:
        if flat is None or fragment.offset + fragment.numel > flat.numel():
            return fragment
        reference = _reference(fragment, p)
        if reference is None:
            continue
        held = flat.detach()[fragment.offset : fragment.offset + fragment.numel]
        held = held.to(device=reference.device, dtype=reference.dtype)
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
        bad = _first_mismatch(shard.flat.detach().reshape(-1), shard.sources)
        if bad is not None:
            message = (
                f"the shard of group {shard.group} does not hold parameter {bad.name!r} at "
                f"[{bad.offset}, {bad.offset + bad.numel}) as DeepSpeed's tables say"
            )
            break
    agreed = not message
    if dp_group is not None:
        agreed = _all_ranks(agreed, dp_group)
    if not agreed:
        raise RuntimeError(
            f"{message or 'another rank does not hold what the tables say'}; {owner} will "
            "not train on it. Were the weights changed after deepspeed.initialize? Load them "
            "before it, or through engine.load_checkpoint"
        )
