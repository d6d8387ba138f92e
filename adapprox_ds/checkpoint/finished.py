# SPDX-License-Identifier: Apache-2.0
"""Finds the newest checkpoint of a run that all processes finished writing.

DeepSpeed's rank 0 writes ``latest`` when its own files are complete, without waiting for the other
processes (0.19.8, runtime/engine.py, ``save_checkpoint``). A job that dies meanwhile can leave a
``latest`` that is empty, or that names a checkpoint without some of its files. Checkpoints saved
before that one are still complete.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapprox_ds.checkpoint.files import CheckpointError, read

_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt$")
_MODEL_FILE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt$")
# A mixture of experts has a model file for each expert, and at stage 0 an optimizer file for each
# process of an expert-parallel group.
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_\d+_model_states\.pt$")
_EXPERTS_OPTIMIZER = re.compile(r"expp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")


def last_finished(folder: str | os.PathLike[str], *, trusted: bool = False) -> Path:
    """Find the checkpoint with the most steps done that is complete and whose files open.

    It can be resumed by ``engine.load_checkpoint(root, tag=last_finished(root).name)``. The files
    of all processes have to be visible here. Each is opened, but its tensors are not read.

    Args:
        folder: the run's root, which was given to ``engine.save_checkpoint``.
        trusted: whether to load objects of any class, which can run any code, as
            ``engine.load_checkpoint`` does. Otherwise a checkpoint with an object that is not safe
            to load is passed over.

    Raises:
        CheckpointError: there is none.
    """
    found: list[tuple[int, str, Path]] = []
    reasons = []
    # Before Python 3.11, glob("*/") also yields files.
    for path in sorted(path for path in Path(folder).glob("*") if path.is_dir()):
        if not any(map(_MODEL_FILE.match, os.listdir(path))) or (path / "zero").exists():
            continue
        try:
            found.append((steps_of(path, trusted=trusted), path.name, path))
        except CheckpointError as error:
            reasons.append(str(error))
    if not found:
        why = f": {'; '.join(reasons)}" if reasons else ""
        raise CheckpointError(f"{folder} holds no finished checkpoint{why}")
    return max(found)[-1]


def steps_of(folder: Path, *, trusted: bool = False) -> int:
    """The number of steps done when ``engine.save_checkpoint`` wrote a checkpoint.

    Raises:
        CheckpointError: the checkpoint is not complete, or a file cannot be read.
    """
    contents: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pt")):
        content = read(path, trusted=trusted)
        if _MODEL_FILE.match(path.name):
            contents[path.name] = content
    if not contents:
        raise CheckpointError(f"{folder} holds no *_model_states.pt: it was not finished")
    names, model = os.listdir(folder), next(iter(contents.values()))
    processes = [
        (str(dp), f"{mp:02d}")
        for mp in range(model.get("mp_world_size", 1))
        for dp in range(model.get("dp_world_size", 1))
    ]
    there = {m.groups() for name in names if (m := _RANK_FILE.search(name))}
    kinds = {kind for _, _, kind in there}
    _require_experts(folder, names, model.get("num_experts") or ())
    written = [int(m[1]) for name in names if (m := _EXPERTS_OPTIMIZER.match(name))]
    if absent := sorted(set(range(max(written, default=-1))) - set(written)):
        raise CheckpointError(
            f"{folder} lacks expp_rank_{absent[0]}_mp_rank_*_optim_states.pt: it was not finished, "
            "or not copied whole"
        )
    if model.get("optimizer") is None and not written:
        kinds.add("optim")  # ZeRO saves the optimizer's state in files of its own
    missing = [
        (dp, kind) for kind in sorted(kinds) for dp, mp in processes if (dp, mp, kind) not in there
    ]
    if missing:
        dp, kind = missing[0]
        raise CheckpointError(
            f"{folder} lacks rank {dp}'s *_{kind}_states.pt and {len(missing) - 1} more: it was "
            "not finished, or not copied whole"
        )
    return int(model["global_steps"])


def _require_experts(folder: Path, names: Sequence[str], experts: Sequence[int]) -> None:
    """Raise unless there is a file for each expert.

    Args:
        folder: the checkpoint.
        names: the names of its files.
        experts: the number of experts of each layer that has experts.

    Raises:
        CheckpointError: a file is missing; the message names the first such file.
    """
    there = {(int(m[1]), int(m[2])) for name in names if (m := _EXPERT_FILE.match(name))}
    wanted = [(layer, e) for layer, count in enumerate(experts) for e in range(count)]
    if missing := [key for key in wanted if key not in there]:
        layer, expert = missing[0]
        raise CheckpointError(
            f"{folder} lacks layer_{layer}_expert_{expert}_mp_rank_*_model_states.pt and "
            f"{len(missing) - 1} more: it was not finished, or not copied whole"
        )
