# SPDX-License-Identifier: Apache-2.0
"""Checks once, before the first step, that all processes have the same settings and model.

Processes with different settings or models would train wrongly without a message, or hang in the
first collective whose sizes differ. So they compare a digest of all that must agree. Only if
digests differ do they send the details, and then all of them raise the same error.
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
from adapprox_ds.core.shards import ShardTable

#: A message describes at most so many kinds of processes, and so many differences of each.
_MOST_KINDS, _MOST_DIFFERENCES = 4, 4
_ABSENT = "absent"


def facts_of_start(
    model: torch.nn.Module | None, params: Mapping[str, Any], groups: Sequence[Any]
) -> dict[str, str]:
    """The facts that must agree before an engine is built.

    Args:
        model: the model; None where processes may have different ones.
        params: the optimizer's arguments in the configuration.
        groups: the parameters or parameter groups that the user gave; not used without a model.

    Returns:
        The value of each fact, by a description for messages.
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


def facts_of_shards(shards: ShardTable[Any]) -> dict[str, str]:
    """The facts that must agree before shards are trained on: each group's settings and parameters.

    Returns:
        The value of each fact, by a description for messages.
    """
    facts = {"adapprox_ds": __version__}
    for i, h in enumerate(shards.settings):
        facts |= {f"{f.name} of group {i}": _shown(getattr(h, f.name)) for f in fields(h)}
    for i, group in enumerate(shards.recorded):
        for j, entry in enumerate(group):
            facts[f"parameter {j} of group {i}"] = _described(entry.name, entry.param)
    return facts


def require_alike(facts: Mapping[str, str], group: Any, owner: str) -> None:
    """Compare facts among the processes of a group; all of them raise, or none does.

    This is a collective call. If all facts agree, it is one all-gather of 40 bytes from each
    process.

    Args:
        facts: the value of each fact, by a description for messages.
        group: torch's process group; None for all processes.
        owner: the optimizer's name.

    Raises:
        RuntimeError: facts differ; the message has their values and the processes with each.
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
    members = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
    for process, (*content, size) in zip(members, torch.stack(gathered).tolist(), strict=True):
        kinds.setdefault(tuple(content), []).append(process)
        # The size is not compared, as another version of zlib may pack the same text differently.
        sizes[process] = size
    if len(kinds) == 1:
        return
    # The kind of most processes comes first.
    order = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[1]))[:_MOST_KINDS]
    told = []
    for _, processes in order:
        speaks = torch.distributed.get_rank() == processes[0]
        own = packed if speaks else bytes(sizes[processes[0]])
        message = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
        comm.broadcast(message, processes[0], group=group)
        told.append((processes, json.loads(zlib.decompress(bytes(message.tolist())))))
    raise RuntimeError(_message(owner, told, len(kinds)))


def collective_device(group: Any) -> torch.device:
    """The device of tensors for DeepSpeed's collectives; None is the group of all processes."""
    from deepspeed.accelerator import get_accelerator

    return place_of(group, torch.device(get_accelerator().current_device_name()))


def any_process(flag: Tensor, group: Any) -> Tensor:
    """The maximum of a flag over the processes of a group, without waiting for a device.

    Args:
        flag: 0 or 1, a 0-dim float tensor on any device.
        group: torch's process group.

    Returns:
        A new 0-dim tensor, on the device that collectives run on.
    """
    from deepspeed import comm

    flag = flag.detach().clone().to(collective_device(group), non_blocking=True)
    comm.all_reduce(flag, op=comm.ReduceOp.MAX, group=group)
    return flag


def _message(owner: str, told: Sequence[tuple[list[int], dict[str, str]]], kinds: int) -> str:
    """The error message, which compares each kind of process with the most frequent one.

    Args:
        owner: the optimizer's name.
        told: for each kind its processes and its facts, the most frequent kind first.
        kinds: the number of kinds, of which ``told`` need not have all.
    """
    usual, common = told[0]
    parts = []
    for processes, facts in told[1:]:
        keys = [k for k in {**common, **facts} if facts.get(k, _ABSENT) != common.get(k, _ABSENT)]
        parts += [
            f"{key} is {facts.get(key, _ABSENT)} on {_listed(processes)} and "
            f"{common.get(key, _ABSENT)} on {_listed(usual)}"
            for key in keys[:_MOST_DIFFERENCES]
        ]
        if len(keys) > _MOST_DIFFERENCES:
            parts.append(f"{len(keys) - _MOST_DIFFERENCES} more on {_listed(processes)}")
    if kinds > len(told):
        parts.append(f"{kinds - len(told)} more kinds of ranks differ")
    return (
        f"{owner}: the ranks were not started alike: {'; '.join(parts)}. Start all of them with "
        "the same script, configuration and release of adapprox_ds"
    )


def _listed(processes: Iterable[int]) -> str:
    """The words for some processes; the numbers after the eighth are left out."""
    processes = list(processes)
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"rank {shown}" if len(processes) == 1 else f"ranks {shown}"


def _shown(value: Any) -> str:
    return repr(float(value) if isinstance(value, Tensor) and value.numel() == 1 else value)


def _described(name: str, p: Any) -> str:
    """Name and whole shape of a parameter; experts are not told apart.

    The processes of an expert-parallel group have different experts.
    """
    if not getattr(p, "allreduce", True):
        return "an expert's"
    return f"{name!r} of shape {tuple(getattr(p, 'ds_shape', p.shape))}"
