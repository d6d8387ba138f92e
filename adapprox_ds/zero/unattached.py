# SPDX-License-Identifier: Apache-2.0
"""Finds the shards of an optimizer that nobody attached, by what DeepSpeed left on its parameters.

Parameters keep what earlier engines left on them. So a wrapper is believed only where it steps this
very optimizer, a mapping only where it leads to the tensors that are stepped; and every tensor that
is stepped must be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, distributed

from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.shards import Shard, ShardLayouts
from adapprox_ds.zero import handshake
from adapprox_ds.zero.discover import (
    START_ALIGNMENT,
    Recorded,
    all_ranks,
    clone_of,
    cut,
    first_mismatch,
    from_wrapper,
    offsets_of,
    rank_in,
    verify,
)
from adapprox_ds.zero.norms import norm_of_groups, norm_of_wrapper

_REMEDY = (
    "call adapprox_ds.attach(engine) after deepspeed.initialize, or use adapprox_ds.initialize"
)


def find(table: ShardLayouts, strangers: Sequence[Tensor]) -> None:
    """Let a table adopt the verified shards, as far as the recorded parameters tell.

    Called in the first step of every rank at once: ranks compare their settings, and agree on each
    thing that could be otherwise.

    Args:
        table: the parameter groups as the optimizer was given them.
        strangers: tensors that are stepped and are no recorded parameters.

    Raises:
        RuntimeError: the parameters do not tell, or no candidate layout holds what it should; or
            ranks that share a shard have different settings or parameters.
    """
    wrapper = _wrapper_of(table)
    ranks = _mapped_ranks(table) if wrapper is None else wrapper.dp_process_group
    if ranks is not None:
        handshake.require_alike(handshake.facts_of_shards(table), ranks, table.owner)
        table.process_group = ranks
        if all_ranks(wrapper is not None, ranks):
            table.adopt(from_wrapper(wrapper, table))
            table.norm = norm_of_wrapper(wrapper, table, ranks)
            table.agree = partial(handshake.any_rank, group=ranks)
            return
        linked = {number: params for number, params in enumerate(_linked(table)) if params}
        mappings = _live_mappings(linked.values(), strangers)
        padding = {
            number: _padding_sizes(params)
            for number, params in linked.items()
            if not any(id(p) in mappings for p in params)
        }
        flats = {flat for _, flat in mappings.values()}
        sizes = {size for fits in padding.values() for size in fits}
        found = all(p in flats or (p.dim() == 1 and p.numel() in sizes) for p in strangers)
        if linked and all_ranks(found, ranks):
            known = Recorded(table)
            shards = [
                _read_mapping(number, params, mappings, known) for number, params in linked.items()
            ]
            table.adopt([shard for shard in shards if shard is not None])
            table.padding = padding
            gradients = _gradients(mappings)
            if all_ranks(gradients is not None, ranks):
                table.norm = norm_of_groups(gradients, table, ranks)
            table.agree = partial(handshake.any_rank, group=ranks)
            return
    table.adopt(_clones(table, strangers))


def _wrapper_of(table: ShardLayouts) -> Any:
    """The wrapper that steps the table's optimizer, where its parameters name it; else None."""
    for group in table.recorded:
        for entry in group:
            for attribute in ("_z3_optimizer", "_zero_optimizer"):
                wrapper = getattr(entry.param, attribute, None)
                stepped = getattr(wrapper, "optimizer", None)
                if stepped is not None and getattr(stepped, "shards", None) is table:
                    return wrapper
    return None


def _mapped_ranks(table: ShardLayouts) -> Any:
    """The process group that parameters were linked for last, while it exists; else None."""
    for group in table.recorded:
        for entry in group:
            if (ranks := getattr(entry.param, "_dp_group", None)) is not None:
                try:
                    distributed.get_process_group_ranks(ranks)
                except (KeyError, ValueError):  # destroyed since, with its engine
                    return None
                return ranks
    return None


def _linked(table: ShardLayouts) -> list[list[Any]]:
    """By recorded group, the parameters that ZeRO-1/2 or BF16_Optimizer linked, now or before."""
    return [
        [entry.param for entry in group if hasattr(entry.param, "_hp_mapping")]
        for group in table.recorded
    ]


def _live_mappings(
    linked: Iterable[Sequence[Any]], strangers: Sequence[Tensor]
) -> dict[int, tuple[Any, Any]]:
    """By parameter's id, its mapping to a shard of the engine at work, and that shard.

    All mappings of an engine share its dict of gradients. A parameter that is frozen in this engine
    keeps its mapping of an earlier one.
    """
    mapped = {
        id(p): (p._hp_mapping, p._hp_mapping.hp_fragment._base)
        for params in linked
        for p in params
        if p._hp_mapping is not None
    }
    stepped = set(strangers)
    engines = {id(m.gradient_dict) for m, flat in mapped.values() if flat in stepped}
    if not engines:  # this rank's shards of the groups at hand may be padding
        engines = {id(m.gradient_dict) for m, _ in mapped.values()}
    if len(engines) != 1:
        return {}
    return {key: pair for key, pair in mapped.items() if id(pair[0].gradient_dict) in engines}


def _gradients(mappings: Mapping[int, tuple[Any, Any]]) -> Any:
    """The dict of gradients of the engine at work; None where this rank does not know it."""
    found = [m for m, _ in mappings.values() if not m.use_offload]
    return found[0].gradient_dict if found else None


def _read_mapping(
    number: int, params: Sequence[Any], mappings: Mapping[int, tuple[Any, Any]], known: Recorded
) -> Shard | None:
    """The shard of a recorded group, from its parameters' ``_hp_mapping``.

    With round_robin_gradients DeepSpeed links the mapping in the wrong order (seen in 0.19.8).
    Where the data say so, the orders that DeepSpeed can lay parameters in are tried in turn.
    """
    ranks = params[0]._dp_group
    mapped = [(p, *mappings[id(p)]) for p in params if id(p) in mappings]
    flat = mapped[0][2] if mapped else None
    sources = []
    for p, mapping, _ in mapped:
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        fragment = ParamFragment(known.name(p), tuple(p.shape), lp.start, lp.numel, hp.start)
        sources.append((fragment, p))
    if all_ranks(first_mismatch(flat, sources) is None, ranks):
        return None if flat is None else Shard.of(flat, number, sources)
    for order, offsets, size in _orders(params):
        size = size if flat is None else flat.numel()
        # A rank that DeepSpeed linked no parameter to cannot hold one under this candidate.
        sources = cut(order, offsets, rank_in(ranks) * size, size, known)
        if all_ranks(first_mismatch(flat, sources) is None, ranks):
            return None if flat is None else Shard.of(flat, number, sources)
    raise RuntimeError(
        f"no known order of the parameters of group {number} matches what its ZeRO shard holds; "
        f"{_REMEDY}"
    )


def _orders(params: Sequence[Any]) -> Iterable[tuple[list[Tensor], list[int], int]]:
    """Every order and alignment in which ZeRO-1/2 can lay out a group, and a shard's size."""
    from deepspeed import comm

    world = comm.get_world_size(group=params[0]._dp_group)
    unit = START_ALIGNMENT * world
    # One that was frozen before this engine is in no shard, one that was since is.
    for members in (params, [p for p in params if p.requires_grad]):
        if not members:
            continue
        element_alignment = max(1, 16 // members[0].element_size())
        for order in (list(members), [p for j in range(world) for p in members[j::world]]):
            for alignment in (1, element_alignment):
                offsets = offsets_of(order, alignment)
                yield order, offsets, -(-(offsets[-1] + order[-1].numel()) // unit) * unit // world


def _padding_sizes(params: Sequence[Any]) -> frozenset[int]:
    """Of a group's shard, the sizes at which this rank's lies behind the last parameter."""
    rank = rank_in(params[0]._dp_group)
    return frozenset(
        size
        for order, offsets, size in _orders(params)
        if rank * size >= offsets[-1] + order[-1].numel()
    )


def _clones(table: ShardLayouts, strangers: Sequence[Tensor]) -> list[Shard]:
    """Stage 0's fp32 clones, one a parameter and in the same order."""
    recorded = [entry.param for group in table.recorded for entry in group]
    shapes = [clone.shape for clone in strangers]
    # DeepSpeed clones frozen and empty parameters too before 0.19.8.
    for params in ([p for p in recorded if p.requires_grad and p.numel()], recorded):
        if [p.shape for p in params] == shapes:
            known = Recorded(table)
            pairs = zip(strangers, params, strict=True)
            shards = [clone_of(clone, p, known) for clone, p in pairs]
            verify(shards, table.owner)
            return shards
    raise RuntimeError(
        f"{table.owner} was stepped with {len(strangers)} "
        "tensors that are not the parameters it was built from, and these do not tell "
        f"what lies in them. If this engine has an optimizer of its own, {_REMEDY}"
    )
