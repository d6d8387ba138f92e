# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's state in a checkpoint: window and error, as they are."""

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
    """A window of sparse gradients, which both moments are read from, and the error feedback."""

    optimizers = ("MicroAdam",)

    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group is MicroAdam's."""
        return "quant_block_size" in group and VIEWS not in group

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Whose state it is, and the rows of its windows."""
        return f"MicroAdam, window of {', '.join(sorted({str(g['window']) for g in groups}))}"

    def whole(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> dict[str, Tensor]:
        """Window and error, block by block as the ranks have them; or dense moments of Adam."""
        windows, errors = [], []
        for h in parameter.held:
            mean, error = _stores(checkpoint.state(h.rank, h.flat), checkpoint)
            windows.append((mean, h.fragment.offset, h.fragment.numel))
            errors.append((error, h.fragment.offset, h.fragment.numel))
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

    def files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """Those of window and error.

        Raises:
            CheckpointError: DeepSpeed's converter made the moments dense.
        """
        _open_window(source, name)
        return (files.EXP_AVG, files.ERROR)

    def kept(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """None."""
        return set()

    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> WindowedPlan:
        """Window and error for one shard's layout."""
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
        """Bytes of what the ranks hold."""
        window = error = 0
        for h in parameter.held:
            lo, hi = h.fragment.offset, h.fragment.offset + h.fragment.numel
            stores = _stores(checkpoint.state(h.rank, h.flat), checkpoint)
            window += stores[0].bytes_between(lo, hi)
            error += stores[1].bytes_between(lo, hi) + checkpoint.compensation_bytes(h)
        return StateSize(window, error)

    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """Bytes of a folder's tensors."""
        window, error = _open(source, name)
        return StateSize(window.allocated_bytes, error.allocated_bytes)


@dataclass(slots=True)
class WindowedPlan:
    """A shard's window and error."""

    shard: Shard
    step: int
    window: WindowStore
    error: ErrorStore

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put them in place."""
        flat = self.shard.flat
        place.optimizer.state[flat] = state_of(flat, self.window, self.error, self.step)


def _stores(
    state: Mapping[str, Any], checkpoint: NativeCheckpoint
) -> tuple[WindowStore, ErrorStore]:
    """What a rank holds of a shard.

    Raises:
        CheckpointError: it is dense.
    """
    mean, error = state.get(FIRST_MOMENT), state.get(ERROR)
    if not isinstance(mean, WindowMean) or not isinstance(error, FeedbackError):
        raise CheckpointError(
            f"{checkpoint.folder} holds {sorted(state)} of MicroAdam without a window: it was "
            "saved before the first step that followed a load of dense moments"
        )
    return mean.store, error.store


def _open_window(source: UniversalFolder, name: str) -> WindowStore:
    """A parameter's window.

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
    """A parameter's window and error.

    Raises:
        CheckpointError: they are none.
    """
    window, error = _open_window(source, name), source.tensor(name, files.ERROR)
    if not isinstance(error, FeedbackError):
        raise CheckpointError(f"{source.file(name, files.ERROR)} holds no error; convert again")
    return window, error.store
