# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of ZeRO to DeepSpeed's universal format, the second moment kept factored.

The output is that of ``deepspeed.checkpoint.ds_to_universal`` (its stage 1/2 form, which its stage
3 loader reads too), with three differences: ``exp_avg_sq.pt`` holds a whole-parameter
``LowRankMoment``; frozen parameters, buffers and a manifest travel along; and there is no pass that
dumps fragments, so a worker's memory is that of one parameter. DeepSpeed's functions find the files
and run the workers; its extraction is not used because it loads whole ranks, misplaces slices under
``round_robin_gradients``, and copies group 0's settings to all groups at stage 3.
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

#: What ``convert`` can do with the second moment.
SECOND_MOMENTS = ("as-saved", "dense")


@dataclass(frozen=True, slots=True)
class _Job:
    """What each worker needs."""

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

    A conversion that ends early leaves a folder ``<output>.incomplete`` that nothing loads, and
    the next one starts over. ``latest_universal`` beside the output is written last.

    Args:
        source: a checkpoint folder (named after its tag), or a run's root with a ``latest`` file.
        output: the folder to make.
        second_moment: "as-saved", factors as factors; or "dense", all that a stock AdamW run
            needs, a first moment that is the mean of updates made one of gradients.
        workers: parallel processes, each holding one parameter; 1 for none.
        strict: compare the fp32 weights with the model's own where the checkpoint has them.
        overwrite: replace an existing output.
        trusted: load objects of any class from the source, which can run any code.

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
    open_native.cache_clear()  # the folder may have been written again since
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
    # Largest first: the workers end together.
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
    """Write one parameter's files."""
    if multiprocessing.parent_process() is not None:
        # DeepSpeed forks its workers; one that entered its parent's OpenMP pool would wait there.
        torch.set_num_threads(1)
    checkpoint = open_native(job.source, job.trusted)
    parameter = checkpoint.parameters[name]
    folder = job.output / files.ZERO / name
    if job.strict:
        _compare(checkpoint, parameter)
    weights = torch.cat([checkpoint.weights(h) for h in parameter.held])
    _write_tensor(folder / files.FP32, weights, parameter)
    del weights
    family = family_of(checkpoint.groups)
    step = family.step(checkpoint, parameter)
    state = dict(family.whole(checkpoint, parameter, step, job.dense))
    for file in list(state):
        _write_state(folder / file, state.pop(file), parameter)
    files.write(folder / files.STEP, torch.tensor(float(step), dtype=torch.float32, device="cpu"))


def _write_state(path: Path, value: Any, parameter: SavedParameter) -> None:
    if isinstance(value, Tensor):
        _write_tensor(path, value, parameter)
    else:
        files.write(path, value)


def _write_tensor(path: Path, flat: Tensor, parameter: SavedParameter) -> None:
    values = flat.view(parameter.shape)
    if not isinstance(values, CompactTensor):
        values = files.compact(values)
    files.write(path, {"param": values, "cat_dim": 0})


def _compare(checkpoint: NativeCheckpoint, parameter: SavedParameter) -> None:
    """Raise unless the optimizer's weights round to the model's own: a check of every address.

    Raises:
        CheckpointError: they do not.
    """
    module = checkpoint.models[0].get("module") or {}
    low = module.get(parameter.name)
    if checkpoint.stage == 3 or not isinstance(low, Tensor) or low.numel() != parameter.numel:
        return
    master = torch.cat([checkpoint.master(h) for h in parameter.held])
    if not torch.equal(master.to(low.dtype), low.reshape(-1)):
        raise CheckpointError(
            f"the weights of {parameter.name!r} in {checkpoint.folder} are not those of its "
            "model file: files of several saves are mixed, or the weights were changed outside "
            "the optimizer; strict=False (--no_strict) converts all the same"
        )


def _write_rest(checkpoint: NativeCheckpoint, output: Path, dense: bool) -> None:
    """Everything that is not a trainable parameter's."""
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
    """The model state's metadata under the name that the loader of the other stages looks for."""
    other = "mp_rank_00" if checkpoint.stage == 3 else "zero_pp_rank_0_mp_rank_00"
    heavy: dict[str, Any] = {"module": {}, "frozen_param_fragments": None}
    torch.save({**checkpoint.models[0], **heavy}, output / f"{other}_model_states.pt")


def _plain_group(group: dict[str, Any], dense: bool) -> dict[str, Any]:
    """A parameter group without what a loader must not take over."""
    if dense and not is_adam(group):
        group = shared_settings(group)
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _write_optimizer_state(
    checkpoint: NativeCheckpoint, output: Path, groups: list[dict[str, Any]], step: int
) -> None:
    """The global state in the forms that the stock loaders of stages 1/2 and of 3 read."""
    from deepspeed import __version__ as deepspeed_version

    optimizer = checkpoint.ranks[0]
    keys = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    # The stage 3 loader copies these to every group: only what all groups agree on. Where they do
    # not agree on ``momentum``, it has to be configured as it was saved for that loader.
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
    files.read(path)  # a setting that is not plain data would make the result unloadable


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _publish(partial_folder: Path, final: Path) -> None:
    """Give the finished folder its name, then let ``latest_universal`` name it."""
    (partial_folder / files.UNFINISHED).unlink()
    replaced = final.with_name(f"{final.name}.replaced{files.PARTIAL_SUFFIX}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)  # whole until the new one has its name
    partial_folder.rename(final)
    files.write_text(final.parent / files.LATEST_UNIVERSAL, final.name)
    shutil.rmtree(replaced, ignore_errors=True)
