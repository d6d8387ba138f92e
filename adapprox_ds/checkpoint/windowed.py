# SPDX-License-Identifier: Apache-2.0
"""How MicroAdam's state, a window of sparse gradients and an error, is converted and loaded.

See :mod:`adapprox_ds.checkpoint.family`. Both are moved without loss where the run keeps them in
blocks of the same elements (:mod:`adapprox_ds.micro_adam.reshard`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import Family, StateSize, register
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder
from adapprox_ds.checkpoint.native import VIEWS, NativeCheckpoint, SavedParameter
from adapprox_ds.checkpoint.place import Placement
from adapprox_ds.core.shards import Shard
from adapprox_ds.core.state import FIRST_MOMENT
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.reshard import fill_error, fill_window, join_errors, join_windows
from adapprox_ds.micro_adam.state import ERROR, new_stores, state_of
from adapprox_ds.micro_adam.tensors import FeedbackError, SquareStore, WindowMean
from adapprox_ds.micro_adam.window import WindowStore


@register
class WindowedState(Family):
    """A window of sparse gradients, which gives both moments, and the error feedback."""

    optimizers = ("MicroAdam",)

    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group is MicroAdam's."""
        return "quant_block_size" in group and VIEWS not in group

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """MicroAdam, and the number of gradients in its windows."""
        return f"MicroAdam, window of {', '.join(sorted({str(g['window']) for g in groups}))}"

    def merge(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> dict[str, Tensor]:
        """Window and error with the blocks that were saved, or, with ``dense``, Adam's moments."""
        windows, errors = [], []
        for part in parameter.parts:
            window, error = _stores(checkpoint.state(part.process, part.flat), checkpoint)
            windows.append((window, part.fragment.offset, part.fragment.numel))
            errors.append((error, part.fragment.offset, part.fragment.numel))
        numel, size = parameter.numel, (parameter.numel,)
        window = join_windows(numel, windows)
        if dense:
            square = SquareStore(window).read(0, numel, torch.float32)
            first = window.read(0, numel, torch.float32)
            return {files.EXP_AVG: first, files.EXP_AVG_SQ: square}
        error = join_errors(numel, errors)
        return {
            files.EXP_AVG: WindowMean(window, size, torch.float32),
            files.ERROR: FeedbackError(error, size, torch.float32),
        }

    def tensor_files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """The files of window and error.

        Raises:
            CheckpointError: DeepSpeed's converter made the moments dense.
        """
        _open_window(source, name)
        return (files.EXP_AVG, files.ERROR)

    def kept_settings(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """None; all settings are loaded."""
        return set()

    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> WindowedPlan:
        """The window and error that fit a shard's layout."""
        h = MicroHyperparameters.of_group(settings[shard.group])
        step = source.step_of_shard(place.names[name] for name in shard.names)
        window, error = new_stores(shard.layout, h, shard.flat.dtype, shard.flat.device)
        window.step = step
        for f in (part.fragment for part in shard.layout.fragments):
            saved_window, saved_error = _open(source, place.names[f.name])
            fill_window(saved_window, window, f.offset, f.numel)
            fill_error(saved_error, error, f.offset, f.numel)
        return WindowedPlan(shard, step, window, error)

    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """The bytes of the state, over all processes."""
        window = error = 0
        for part in parameter.parts:
            lo, hi = part.fragment.offset, part.fragment.end
            stores = _stores(checkpoint.state(part.process, part.flat), checkpoint)
            window += stores[0].bytes_between(lo, hi)
            error += stores[1].bytes_between(lo, hi) + checkpoint.compensation_bytes(part)
        return StateSize(window, error)

    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """The bytes of the files' tensors."""
        window, error = _open(source, name)
        return StateSize(window.allocated_bytes, error.allocated_bytes)


@dataclass(slots=True)
class WindowedPlan:
    """The new state of a shard.

    Attributes:
        shard: the shard.
        step: the number of steps done.
        window: the new window.
        error: the new error.
    """

    shard: Shard
    step: int
    window: WindowStore
    error: ErrorStore

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put window and error into the optimizer's state."""
        flat = self.shard.flat
        place.optimizer.state[flat] = state_of(flat, self.window, self.error, self.step)


def _stores(
    state: Mapping[str, Any], checkpoint: NativeCheckpoint
) -> tuple[WindowStore, ErrorStore]:
    """The window and the error in the state that a process saved for a flat tensor.

    Raises:
        CheckpointError: the state has dense moments instead.
    """
    mean, error = state.get(FIRST_MOMENT), state.get(ERROR)
    if not isinstance(mean, WindowMean) or not isinstance(error, FeedbackError):
        raise CheckpointError(
            f"{checkpoint.folder} holds {sorted(state)} of MicroAdam without a window: it was "
            "saved before the first step that followed a load of dense moments"
        )
    return mean.store, error.store


def _open_window(source: UniversalFolder, name: str) -> WindowStore:
    """The window of a parameter in a universal checkpoint.

    Raises:
        CheckpointError: DeepSpeed's converter made it dense.
    """
    mean = source.tensor(name, files.EXP_AVG)
    if not isinstance(mean, WindowMean):
        raise CheckpointError(
            f"{source.file(name, files.EXP_AVG)} holds a dense moment, as DeepSpeed's converter "
            "makes of a window: an AdamW run can load it; for MicroAdam use python -m adapprox_ds "
            "convert"
        )
    return mean.store


def _open(source: UniversalFolder, name: str) -> tuple[WindowStore, ErrorStore]:
    """The window and the error of a parameter in a universal checkpoint.

    Raises:
        CheckpointError: a file has something else.
    """
    window, error = _open_window(source, name), source.tensor(name, files.ERROR)
    if not isinstance(error, FeedbackError):
        raise CheckpointError(f"{source.file(name, files.ERROR)} holds no error; convert again")
    return window, error.store
