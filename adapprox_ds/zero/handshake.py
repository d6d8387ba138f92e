# SPDX-License-Identifier: Apache-2.0
"""Ranks that train together must be started alike: compared once, before they touch a shard.

Ranks with other settings or another model would train on in silence, or hang in the first
collective whose sizes differ. So they compare a digest of what must agree; only where it differs do
they send the details, and then all of them raise the same error.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from adapprox_ds._version import __version__
from adapprox_ds.core.peers import place_of
from adapprox_ds.core.shards import ShardLayouts

#: Kinds of ranks, and differences between two of them, that a message names.
_MOST_KINDS, _MOST_DIFFERENCES = 4, 4
_ABSENT = "absent"


def facts_of_start(
    model: torch.nn.Module | None, params: Mapping[str, Any], groups: Sequence[Any]
) -> dict[str, str]:
    """What must agree before an engine is built.

    Args:
        model: None where ranks may have different ones.
        params: the optimizer's arguments, as far as the configuration gives them.
        groups: parameters or parameter groups, as far as they are given; not read without a model.
    """
    facts = {"adapprox_ds": __version__}
    facts |= {f'"{name}" of the optimizer\'s params': _shown(v) for name, v in params.items()}
    names: dict[int, str] = {}
    for i, (name, p) in enumerate(model.named_parameters() if model is not None else ()):
        kind = f"{p.dtype}, {'trained' if p.requires_grad else 'frozen'}"
        facts[f"parameter {i} of the model"] = f"{_described(name, p)}, {kind}"
        names[id(p)] = name
    for i, group in enumerate(groups if names else ()):
        if isinstance(group, dict):
            members = group["params"]
            members = [members] if isinstance(members, Tensor) else members
            known = [names.get(id(p), "another") for p in members if isinstance(p, Tensor)]
            facts[f"parameters of group {i}"] = ", ".join(known)
    return facts


def facts_of_shards(shards: ShardLayouts) -> dict[str, str]:
    """What must agree before shards are trained on: each group's settings and parameters."""
    facts = {"adapprox_ds": __version__}
    for i, h in enumerate(getattr(shards, "settings", ())):
        facts |= {f"{f.name} of group {i}": _shown(getattr(h, f.name)) for f in fields(h)}
    for i, group in enumerate(shards.recorded):
        for j, entry in enumerate(group):
            facts[f"parameter {j} of group {i}"] = _described(entry.name, entry.param)
    return facts


def require_alike(facts: Mapping[str, str], group: Any, owner: str) -> None:
    """Compare facts among the ranks of a process group; all of them raise, or none does.

    One gather of 40 bytes a rank where all is well. Works on any device that DeepSpeed's
    collectives run on.

    Args:
        facts: what must agree, in plain words.
        group: the ranks to compare; None for all.
        owner: the optimizer's name.

    Raises:
        RuntimeError: names what differs, its values, and the ranks that have each.
    """
    from deepspeed import comm

    text = json.dumps(facts).encode()
    packed = zlib.compress(text)
    device = collective_device(group)
    digest = struct.unpack("4q", hashlib.sha256(text).digest())
    mine = torch.tensor([*digest, len(packed)], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(comm.get_world_size(group=group))]
    comm.all_gather(gathered, mine, group=group)
    kinds: dict[tuple[int, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    names = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
    for rank, (*content, size) in zip(names, torch.stack(gathered).tolist(), strict=True):
        kinds.setdefault(tuple(content), []).append(rank)
        sizes[rank] = size  # not compared: another zlib packs the same text otherwise
    if len(kinds) == 1:
        return
    # What most ranks have comes first.
    order = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[1]))[:_MOST_KINDS]
    told = []
    for _, ranks in order:
        speaks = torch.distributed.get_rank() == ranks[0]
        own = packed if speaks else bytes(sizes[ranks[0]])
        message = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
        comm.broadcast(message, ranks[0], group=group)
        told.append((ranks, _unpacked(message)))
    raise RuntimeError(_message(owner, told, len(kinds)))


def collective_device(group: Any) -> torch.device:
    """Where to make what a collective of DeepSpeed's is given; None is the group of all ranks."""
    from deepspeed.accelerator import get_accelerator

    return place_of(group, torch.device(get_accelerator().current_device_name()))


def any_rank(flag: Tensor, group: Any) -> Tensor:
    """A flag of 0 or 1 that is 1 where any rank's is; the host does not wait for a device.

    Args:
        flag: 0-dim float, on any device.
        group: the ranks.

    Returns:
        A new tensor, on the device that collectives run on.
    """
    from deepspeed import comm

    flag = flag.detach().clone().to(collective_device(group), non_blocking=True)
    comm.all_reduce(flag, op=comm.ReduceOp.MAX, group=group)
    return flag


def _unpacked(message: Tensor) -> dict[str, str]:
    facts: dict[str, str] = json.loads(zlib.decompress(bytes(message.tolist())))
    return facts


def _message(owner: str, told: Sequence[tuple[list[int], dict[str, str]]], kinds: int) -> str:
    """Each kind of rank against the first."""
    usual, common = told[0]
    parts = []
    for ranks, facts in told[1:]:
        keys = [k for k in {**common, **facts} if facts.get(k, _ABSENT) != common.get(k, _ABSENT)]
        parts += [
            f"{key} is {facts.get(key, _ABSENT)} on {_ranks(ranks)} and "
            f"{common.get(key, _ABSENT)} on {_ranks(usual)}"
            for key in keys[:_MOST_DIFFERENCES]
        ]
        if len(keys) > _MOST_DIFFERENCES:
            parts.append(f"{len(keys) - _MOST_DIFFERENCES} more on {_ranks(ranks)}")
    if kinds > len(told):
        parts.append(f"{kinds - len(told)} more kinds of ranks differ")
    return (
        f"{owner}: the ranks were not started alike: {'; '.join(parts)}. Start all of them with "
        "the same script, configuration and release of adapprox_ds"
    )


def _ranks(ranks: Iterable[int]) -> str:
    """In words; long lists are cut."""
    ranks = list(ranks)
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _shown(value: Any) -> str:
    return repr(float(value) if isinstance(value, Tensor) and value.numel() == 1 else value)


def _described(name: str, p: Any) -> str:
    """Name and whole shape; ranks of an expert-parallel group hold different experts."""
    if not getattr(p, "allreduce", True):
        return "an expert's"
    return f"{name!r} of shape {tuple(getattr(p, 'ds_shape', p.shape))}"
