# SPDX-License-Identifier: Apache-2.0
"""Finds the shards of an optimizer that was not attached, from attributes of its parameters.

DeepSpeed sets attributes of the parameters that lead to its wrapper of the optimizer, or to the
shard that contains a parameter (a mapping). Parameters keep such attributes of earlier engines. So
a wrapper counts only if it wraps this very optimizer, and a mapping only if it leads to a tensor
that the optimizer is stepped with; and every such tensor has to be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, distributed

from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.shards import Shard, ShardTable
from adapprox_ds.zero import handshake
from adapprox_ds.zero.discover import (
    Recorded,
    adopt,
    all_processes,
    clone_of,
    first_mismatch,
    fragments_between,
    offsets_of,
    process_number,
    verify,
)
from adapprox_ds.zero.norms import norm_of_groups
from adapprox_ds.zero.partition import START_ALIGNMENT

_REMEDY = (
    "call adapprox_ds.attach(engine) after deepspeed.initialize, or use adapprox_ds.initialize"
)


def find(table: ShardTable[Any], unknown: Sequence[Tensor]) -> None:
    """Find the shards of an optimizer, verify them, and let its table adopt them.

    This is a collective call in the first step. The processes compare their settings, and agree on
    each finding on which the next steps of the search depend.

    Args:
        table: the table of the optimizer, with the parameters that it was built from.
        unknown: the tensors of the step that are no recorded parameters.

    Raises:
        RuntimeError: the parameters do not lead to the shards, no possible layout is that of a
            shard, or processes that share a shard have different settings or parameters.
    """
    wrapper = _wrapper_of(table)
    group = _linked_group(table) if wrapper is None else wrapper.dp_process_group
    if group is not None:
        handshake.require_alike(handshake.facts_of_shards(table), group, table.owner)
        table.process_group = group
        if all_processes(wrapper is not None, group):
            adopt(wrapper, table, group)
            return
        linked = _linked(table)
        mappings = _live_mappings(linked.values(), unknown)
        padding = {
            number: _padding_sizes(params)
            for number, params in linked.items()
            if not any(id(p) in mappings for p in params)
        }
        flats = {flat for _, flat in mappings.values()}
        sizes = {size for fits in padding.values() for size in fits}
        found = all(p in flats or (p.dim() == 1 and p.numel() in sizes) for p in unknown)
        if linked and all_processes(found, group):
            known = Recorded(table)
            shards = [
                _read_mapping(number, params, mappings, known) for number, params in linked.items()
            ]
            table.adopt([shard for shard in shards if shard is not None])
            table.padding = padding
            # The engine's dict of gradients, which this process's parameters need not have.
            known_to = [m for m, _ in mappings.values() if not m.use_offload]
            if all_processes(bool(known_to), group):
                table.norm = norm_of_groups(known_to[0].gradient_dict, table, group)
            table.agree = partial(handshake.any_process, group=group)
            return
    table.adopt(_clones(table, unknown))


def _wrapper_of(table: ShardTable[Any]) -> Any:
    """The wrapper of the table's optimizer, if a parameter leads to it; otherwise None."""
    for group in table.recorded:
        for entry in group:
            for attribute in ("_z3_optimizer", "_zero_optimizer"):
                wrapper = getattr(entry.param, attribute, None)
                stepped = getattr(wrapper, "optimizer", None)
                if stepped is not None and getattr(stepped, "shards", None) is table:
                    return wrapper
    return None


def _linked_group(table: ShardTable[Any]) -> Any:
    """The process group of the engine that linked the parameters last; None if it is gone."""
    for recorded in table.recorded:
        for entry in recorded:
            if (group := getattr(entry.param, "_dp_group", None)) is not None:
                try:
                    distributed.get_process_group_ranks(group)
                except (KeyError, ValueError):  # it was destroyed with its engine
                    return None
                return group
    return None


def _linked(table: ShardTable[Any]) -> dict[int, list[Any]]:
    """By recorded group, the parameters that ZeRO-1/2 or BF16_Optimizer ever linked to shards."""
    linked: dict[int, list[Any]] = {}
    for number, group in enumerate(table.recorded):
        if params := [entry.param for entry in group if hasattr(entry.param, "_hp_mapping")]:
            linked[number] = params
    return linked


def _live_mappings(
    linked: Iterable[Sequence[Any]], unknown: Sequence[Tensor]
) -> dict[int, tuple[Any, Any]]:
    """The mappings that the present engine made, without those of earlier engines.

    The mappings of one engine have its dict of gradients in common. A parameter that is frozen in
    the present engine still has its mapping of an earlier one.

    Args:
        linked: the linked parameters of each group.
        unknown: the tensors of the step that are no recorded parameters.

    Returns:
        For the id of each parameter, its mapping and the shard that the mapping leads to; empty
        where the present engine cannot be told from others.
    """
    mapped = {
        id(p): (p._hp_mapping, p._hp_mapping.hp_fragment._base)
        for params in linked
        for p in params
        if p._hp_mapping is not None
    }
    stepped = set(unknown)
    engines = {id(m.gradient_dict) for m, flat in mapped.values() if flat in stepped}
    if not engines:
        # This process's shards of the groups that are being stepped are padding alone.
        engines = {id(m.gradient_dict) for m, _ in mapped.values()}
    if len(engines) != 1:
        return {}
    return {key: pair for key, pair in mapped.items() if id(pair[0].gradient_dict) in engines}


def _read_mapping(
    number: int, params: Sequence[Any], mappings: Mapping[int, tuple[Any, Any]], known: Recorded
) -> Shard | None:
    """The shard of a recorded group, from its parameters' ``_hp_mapping``; a collective call.

    Under round_robin_gradients DeepSpeed makes the mappings in a wrong order (seen in 0.19.8). If
    the shard does not contain the weights that they say, every order in which DeepSpeed can lay out
    the parameters is tried.

    Args:
        number: the index of the group.
        params: its linked parameters.
        mappings: see :func:`_live_mappings`.
        known: gives the parameters' names.

    Returns:
        The shard; None where this process's shard of the group is padding alone.

    Raises:
        RuntimeError: no order fits.
    """
    group = params[0]._dp_group
    mapped = [(p, *mappings[id(p)]) for p in params if id(p) in mappings]
    flat = mapped[0][2] if mapped else None
    sources = []
    for p, mapping, _ in mapped:
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        fragment = ParamFragment(known.name(p), tuple(p.shape), lp.start, lp.numel, hp.start)
        sources.append((fragment, p))
    if all_processes(first_mismatch(flat, sources) is None, group):
        return None if flat is None else Shard.of(flat, number, sources)
    for order, offsets, size in _orders(params):
        size = size if flat is None else flat.numel()
        # A process to which no parameter was linked does not know its shard (``flat`` is None). A
        # candidate fits there only if it gives this process no parameter.
        sources = fragments_between(order, offsets, process_number(group) * size, size, known)
        if all_processes(first_mismatch(flat, sources) is None, group):
            return None if flat is None else Shard.of(flat, number, sources)
    raise RuntimeError(
        f"no known order of the parameters of group {number} matches what its ZeRO shard holds; "
        f"{_REMEDY}"
    )


def _orders(params: Sequence[Any]) -> Iterable[tuple[list[Tensor], list[int], int]]:
    """Yield every way in which ZeRO-1/2 can lay out the parameters of a group.

    Yields:
        The parameters in their order, their offsets in the group's flat tensor, and the size of a
        process's shard of it.
    """
    from deepspeed import comm

    world = comm.get_world_size(group=params[0]._dp_group)
    unit = START_ALIGNMENT * world
    # A parameter that was frozen before the engine was built is in no shard; one that was frozen
    # afterwards is.
    for members in (params, [p for p in params if p.requires_grad]):
        if not members:
            continue
        element_alignment = max(1, 16 // members[0].element_size())
        for order in (list(members), [p for j in range(world) for p in members[j::world]]):
            for alignment in (1, element_alignment):
                offsets = offsets_of(order, alignment)
                yield order, offsets, -(-(offsets[-1] + order[-1].numel()) // unit) * unit // world


def _padding_sizes(params: Sequence[Any]) -> frozenset[int]:
    """The sizes of this process's shard of a group at which it lies behind the last parameter."""
    number = process_number(params[0]._dp_group)
    return frozenset(
        size
        for order, offsets, size in _orders(params)
        if number * size >= offsets[-1] + order[-1].numel()
    )


def _clones(table: ShardTable[Any], unknown: Sequence[Tensor]) -> list[Shard]:
    """The fp32 clones of the parameters, which DeepSpeed steps at stage 0, as shards.

    Args:
        table: the table of the optimizer.
        unknown: the tensors of the step, which must be the clones in the order of the parameters.

    Raises:
        RuntimeError: they are not.
    """
    recorded = [entry.param for group in table.recorded for entry in group]
    shapes = [clone.shape for clone in unknown]
    # Before 0.19.8 DeepSpeed clones frozen and empty parameters too.
    for params in ([p for p in recorded if p.requires_grad and p.numel()], recorded):
        if [p.shape for p in params] == shapes:
            known = Recorded(table)
            pairs = zip(unknown, params, strict=True)
            shards = [clone_of(clone, p, known) for clone, p in pairs]
            verify(shards, table.owner)
            return shards
    raise RuntimeError(
        f"{table.owner} was stepped with {len(unknown)} "
        "tensors that are not the parameters it was built from, and these do not lead to "
        f"the layout of the tensors. If this engine has an optimizer of its own, {_REMEDY}"
    )
