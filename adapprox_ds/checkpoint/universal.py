# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of ZeRO to DeepSpeed's universal format, with compact state kept compact.

The output is that of ``deepspeed.checkpoint.ds_to_universal`` for stages 1 and 2, which DeepSpeed's
loader of stage 3 reads too. It differs in that ``exp_avg_sq.pt`` contains the
``LowRankMoment`` of a whole parameter, and in that frozen parameters, buffers and a manifest are
written too.

DeepSpeed's functions find the files and run the worker processes. Its function that extracts
fragments is not used: it loads all that a process saved, where a worker here needs the memory of
one parameter; it misplaces fragments under ``round_robin_gradients``; and at stage 3 it copies the
settings of the first group to all groups.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapprox_ds._version import __version__
from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import family_of
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.moments import is_adam, shared_settings
from adapprox_ds.checkpoint.native import NativeCheckpoint, SavedParameter, open_native
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.zero.compat import map_in_processes

#: The forms in which ``convert`` can write the second moment.
SECOND_MOMENTS = ("as-saved", "dense")


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of :func:`convert` that its worker processes need.

    Attributes:
        source: the folder of the checkpoint.
        output: the unfinished output folder.
        dense: whether the moments are to be dense.
        strict: see :func:`convert`.
        trusted: see :func:`convert`.
    """

    source: Path
    output: Path
    dense: bool
    strict: bool
    trusted: bool


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    second_moment: str = "as-saved",
    workers: int = 2,
    strict: bool = True,
    overwrite: bool = False,
    trusted: bool = False,
) -> Path:
    """Convert a checkpoint to the universal format.

    A conversion that is interrupted leaves a folder ``<output>.incomplete`` that nothing loads, and
    the next conversion starts anew. The file ``latest_universal`` beside the output, which names
    it, is written last.

    Args:
        source: a checkpoint's folder, which is named after its tag, or a run's root with a
            ``latest`` file.
        output: the folder to make.
        second_moment: "as-saved" keeps factors as factors. "dense" writes what a stock AdamW run
            needs: a dense second moment, and a first moment that is a mean of gradients.
        workers: the number of worker processes, each of which needs the memory of one parameter;
            with 1, the conversion runs in this process.
        strict: whether to compare the fp32 weights with the model's, if the checkpoint has those.
        overwrite: whether to replace an existing output.
        trusted: whether to load objects of any class from the source, which can run any code.

    Returns:
        The output folder.

    Raises:
        CheckpointError: the source is incomplete or not supported, or the output exists.
        ValueError: an argument's value is not allowed.
    """
    if second_moment not in SECOND_MOMENTS:
        raise ValueError(f"second_moment={second_moment!r}; allowed: {SECOND_MOMENTS}")
    if workers < 1:
        raise ValueError(f"workers={workers!r}; allowed: an integer >= 1")
    from deepspeed.utils import logger

    folder = files.resolve(source, files.LATEST).resolve()
    final = Path(output).resolve()
    if final.exists() and not overwrite:
        raise CheckpointError(f"{final} exists; remove it, or overwrite it (--overwrite)")
    open_native.cache_clear()  # the folder may have been written anew since it was opened
    checkpoint = open_native(folder, trusted)
    if checkpoint.corrected:
        logger.info(
            f"round_robin_gradients: {checkpoint.corrected} slice addresses of {folder} corrected"
        )
    partial_folder = final.with_name(final.name + files.PARTIAL_SUFFIX)
    if partial_folder.exists():
        logger.warning(f"removing {partial_folder}, which an interrupted conversion left behind")
        shutil.rmtree(partial_folder)
    partial_folder.mkdir(parents=True)
    files.write_text(partial_folder / files.UNFINISHED, "A conversion is at work or was killed.\n")
    dense = second_moment == "dense"
    job = _Job(folder, partial_folder, dense, strict, trusted)
    _convert_parameters(checkpoint, job, workers)
    _write_rest(checkpoint, partial_folder, dense)
    _publish(partial_folder, final)
    return final


def _convert_parameters(checkpoint: NativeCheckpoint, job: _Job, workers: int) -> None:
    # The largest parameters come first, so that the workers end at about the same time.
    names = sorted(checkpoint.parameters, key=lambda n: -checkpoint.parameters[n].numel)
    work: Callable[[str], None] = partial(_convert_parameter, job)
    try:
        map_in_processes(work, names, workers)
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"one of {workers} worker processes was killed, perhaps for memory: convert again with "
            "fewer (--num_merge_workers)"
        ) from error


def _convert_parameter(job: _Job, name: str) -> None:
    """Write the files of one parameter."""
    if multiprocessing.parent_process() is not None:
        # DeepSpeed forks its workers. A forked process that uses OpenMP threads waits for those of
        # its parent, for ever.
        torch.set_num_threads(1)
    checkpoint = open_native(job.source, job.trusted)
    parameter = checkpoint.parameters[name]
    folder = job.output / files.ZERO / name
    if job.strict:
        _compare(checkpoint, parameter)
    weights = torch.cat([checkpoint.weights(part) for part in parameter.parts])
    _write(folder / files.FP32, weights, parameter)
    del weights
    family = family_of(checkpoint.groups)
    step = family.step(checkpoint, parameter)
    state = dict(family.merge(checkpoint, parameter, step, job.dense))
    for file in list(state):
        _write(folder / file, state.pop(file), parameter)
    files.write(folder / files.STEP, torch.tensor(float(step), dtype=torch.float32, device="cpu"))


def _write(path: Path, value: Any, parameter: SavedParameter) -> None:
    if isinstance(value, Tensor):
        shaped = value.view(parameter.shape)
        compact = shaped if isinstance(shaped, CompactTensor) else files.compact(shaped)
        value = {"param": compact, "cat_dim": 0}
    files.write(path, value)


def _compare(checkpoint: NativeCheckpoint, parameter: SavedParameter) -> None:
    """Check that the optimizer's weights of a parameter, when rounded, are those of the model.

    This also checks that the offsets of the parameter's parts are right. It does nothing where the
    checkpoint does not have the model's weights as one tensor.

    Raises:
        CheckpointError: the weights differ.
    """
    module = checkpoint.models[0].get("module") or {}
    low = module.get(parameter.name)
    if checkpoint.stage == 3 or not isinstance(low, Tensor) or low.numel() != parameter.numel:
        return
    master = torch.cat([checkpoint.master(part) for part in parameter.parts])
    if not torch.equal(master.to(low.dtype), low.reshape(-1)):
        raise CheckpointError(
            f"the weights of {parameter.name!r} in {checkpoint.folder} are not those of its "
            "model file: files of several saves are mixed, or the weights were changed outside "
            "the optimizer; strict=False (--no_strict) converts all the same"
        )


def _write_rest(checkpoint: NativeCheckpoint, output: Path, dense: bool) -> None:
    """Write all files except those of the trainable parameters.

    Args:
        checkpoint: the checkpoint.
        output: the folder to write to.
        dense: whether the moments are dense, for a stock AdamW run.
    """
    frozen: dict[str, tuple[int, ...]] = {}
    for name, shape, parts in checkpoint.frozen():
        numel = int(torch.Size(shape).numel())
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        values = torch.cat(parts)[:numel] if parts else none
        files.write(output / files.FROZEN / f"{name}.pt", files.compact(values.view(shape)))
        frozen[name] = shape
    buffers = {name: files.compact(value) for name, value in checkpoint.buffers().items()}
    files.write(output / files.BUFFERS, buffers)
    try:
        for path in checkpoint.model_files:
            shutil.copy2(path, output)
        _write_other_model_file(checkpoint, output)
    except (OSError, RuntimeError) as error:
        raise files.unwritable(output, error) from error
    groups = [_plain_group(group, dense) for group in checkpoint.groups]
    any_parameter = next(iter(checkpoint.parameters.values()))
    step = family_of(checkpoint.groups).step(checkpoint, any_parameter)
    _write_optimizer_state(checkpoint, output, groups, step)
    manifest = {
        "format_version": files.FORMAT_VERSION,
        "package_version": __version__,
        "source": {"stage": checkpoint.stage, "world": checkpoint.world},
        "step": step,
        "parameters": {n: (p.shape, p.group) for n, p in checkpoint.parameters.items()},
        "frozen": frozen,
        "buffers": {name: tuple(value.shape) for name, value in buffers.items()},
    }
    files.write(output / files.MANIFEST, manifest)


def _write_other_model_file(checkpoint: NativeCheckpoint, output: Path) -> None:
    """Write the metadata of the model state to a file for loaders of the other stages.

    They look for it under another name than that which the checkpoint's own stage uses.
    """
    other = "mp_rank_00" if checkpoint.stage == 3 else "zero_pp_rank_0_mp_rank_00"
    heavy: dict[str, Any] = {"module": {}, "frozen_param_fragments": None}
    torch.save({**checkpoint.models[0], **heavy}, output / f"{other}_model_states.pt")


def _plain_group(group: dict[str, Any], dense: bool) -> dict[str, Any]:
    """The settings of a parameter group that a loader may use."""
    if dense and not is_adam(group):
        group = shared_settings(group)
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _write_optimizer_state(
    checkpoint: NativeCheckpoint, output: Path, groups: list[dict[str, Any]], step: int
) -> None:
    """Write the global optimizer state in a form that DeepSpeed's loaders of all stages read.

    Args:
        checkpoint: the checkpoint.
        output: the folder to write to.
        groups: the settings of the parameter groups.
        step: the number of steps done.
    """
    from deepspeed import __version__ as deepspeed_version

    optimizer = checkpoint.optimizer_states[0]
    keys = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    # DeepSpeed's loader of stage 3 copies these settings to every group, so only those that all
    # groups have in common are written. A run that uses that loader and has groups of different
    # ``momentum`` must be configured with the saved ones.
    common = {k: v for k, v in groups[0].items() if all(_same(g.get(k), v) for g in groups)}
    state = {
        **{key: optimizer[key] for key in keys if key in optimizer},
        "zero_stage": checkpoint.stage,
        "ds_version": optimizer.get("ds_version", deepspeed_version),
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(step), dtype=torch.float32, device="cpu")}},
            "param_groups": [common],
        },
    }
    path = output / files.ZERO / files.OPTIMIZER_STATE
    files.write(path, state)
    files.read(path)  # this raises if a setting is no plain data, which could not be loaded


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _publish(partial_folder: Path, final: Path) -> None:
    """Rename the finished folder to its final name, and then write ``latest_universal``."""
    (partial_folder / files.UNFINISHED).unlink()
    replaced = final.with_name(f"{final.name}.replaced{files.PARTIAL_SUFFIX}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)  # it is deleted only after the new one is in its place
    partial_folder.rename(final)
    files.write_text(final.parent / files.LATEST_UNIVERSAL, final.name)
    shutil.rmtree(replaced, ignore_errors=True)
