# SPDX-License-Identifier: Apache-2.0
"""Opens universal checkpoints, from our converter or DeepSpeed's, and checks that they are usable.

DeepSpeed's converter (``ds_to_universal``) writes less than ours: it leaves out which parameter is
in which group, the shapes, and some or all of the frozen parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adapprox_ds.adapprox.factors import FactorStore
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.reshard import dense_store
from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.files import CheckpointError


@dataclass(slots=True)
class UniversalFolder:
    """An open universal checkpoint. Its tensors are mapped when they are asked for.

    Attributes that DeepSpeed's converter does not record are None in its checkpoints.

    Attributes:
        path: the folder.
        names: the names of the trainable parameters in it.
        groups: the settings of the optimizer's parameter groups. They say what the first moment is
            the mean of (``moments.kind_of``).
        state: the content of ``zero/optimizer_state.pt``.
        group_of: the index of each trainable parameter's group, by name; None: not recorded.
        frozen: the shapes of the parameters that are not trained, by name; None: not recorded.
        buffers: the shapes of the persistent buffers, by name; None: not recorded.
        shapes: the shapes of the trainable parameters, by name; None: not recorded.
        source: ``stage`` and ``world``, the ZeRO stage and the number of processes of the run that
            saved; empty: not recorded.
        loose: the names of frozen parameters and buffers that DeepSpeed's converter of stages 1 and
            2 wrote as if they were trainable parameters, but without an optimizer state.
    """

    path: Path
    names: set[str]
    groups: list[dict[str, Any]]
    state: dict[str, Any]
    group_of: dict[str, int] | None = None
    frozen: dict[str, tuple[int, ...]] | None = None
    buffers: dict[str, tuple[int, ...]] | None = None
    shapes: dict[str, tuple[int, ...]] | None = None
    source: dict[str, int] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)

    @property
    def is_ours(self) -> bool:
        """Whether our converter wrote the checkpoint, and not DeepSpeed's."""
        return self.group_of is not None

    def file(self, name: str, file: str) -> Path:
        """The path of one of a parameter's files."""
        return self.path / files.ZERO / name / file

    def tensor(self, name: str, file: str) -> Tensor:
        """The tensor in one of a parameter's files.

        It has the parameter's shape, or is 1-D where DeepSpeed's converter of stage 3 wrote it.

        Raises:
            CheckpointError: the file is missing or unreadable, or contains no tensor.
        """
        content = files.read(self.file(name, file))
        value = content.get("param") if isinstance(content, dict) else content
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{self.file(name, file)} holds no tensor; convert again")
        return value

    def second_moment(self, name: str) -> FactorStore:
        """A parameter's second moment: factors, or one dense run of all of its elements.

        The offsets in the store are indices in the flattened parameter.
        """
        value = self.tensor(name, files.EXP_AVG_SQ)
        if isinstance(value, LowRankMoment):
            return value.store
        return dense_store(value, "variance")

    def fixed(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of each frozen parameter and buffer in the checkpoint."""
        for name in self.frozen or {}:
            yield name, files.read(self.path / files.FROZEN / f"{name}.pt")
        if self.buffers:
            yield from files.read(self.path / files.BUFFERS).items()
        for name in self.loose:
            yield name, self.tensor(name, files.FP32)

    @property
    def holds_fixed(self) -> set[str]:
        """The names of the frozen parameters and buffers that :meth:`fixed` yields."""
        return {*(self.frozen or ()), *(self.buffers or ()), *self.loose}

    def has_first_moment(self, name: str) -> bool:
        """Whether a parameter had a first moment, that is, whether beta_1 > 0."""
        group = self.groups[self.group_of[name] if self.group_of is not None else 0]
        return bool(group["betas"][0] > 0)

    def step(self, name: str) -> int:
        """The number of steps done on a parameter.

        DeepSpeed's converter of stage 3 writes one number for all parameters.
        """
        path = self.file(name, files.STEP)
        if path.exists():
            return int(files.read(path))
        return self.common_step

    def step_of_shard(self, names: Iterable[str]) -> int:
        """The number of steps done on parameters that will share a shard.

        Args:
            names: the parameters' names; empty for a shard of padding.

        Raises:
            CheckpointError: the numbers of the parameters differ.
        """
        steps = {self.step(name) for name in names}
        if len(steps) > 1:
            raise CheckpointError(
                f"{self.path}: parameters that share a shard here were saved after different "
                f"numbers of steps: {sorted(steps)}"
            )
        return steps.pop() if steps else self.common_step

    @property
    def common_step(self) -> int:
        """The number of steps done, where one number has to do for all parameters.

        Raises:
            CheckpointError: the checkpoint does not contain it.
        """
        base = self.state.get("optimizer_state_dict") or {}
        found = [int(s["step"]) for s in (base.get("state") or {}).values() if "step" in s]
        if not found and self.names:
            path = self.file(min(self.names), files.STEP)
            found = [int(files.read(path))] if path.exists() else []
        # The groups are looked at last, since FusedAdam leaves a 0 there.
        found = found or [int(g["step"]) for g in self.groups if "step" in g]
        if not found:
            raise CheckpointError(f"{self.path} does not say how many steps were done")
        return max(found)

    def metadata(self) -> dict[str, Any]:
        """The engine's and the scheduler's state, and the client state.

        Raises:
            CheckpointError: the file with them is missing or unreadable.
        """
        candidates = sorted(self.path.glob("*_model_states.pt"))
        if not candidates:
            raise CheckpointError(f"{self.path} holds no *_model_states.pt; convert again")
        # Of several files, the smallest is one without the weights.
        smallest = min(candidates, key=lambda path: path.stat().st_size)
        content: dict[str, Any] = files.read(smallest)
        return content


def open_universal(folder: Path) -> UniversalFolder:
    """Open a universal checkpoint, and check that it is complete and of a known version.

    Raises:
        CheckpointError: it is not, or it is no universal checkpoint.
    """
    if (
        folder.name.endswith(files.PARTIAL_SUFFIX)
        or (folder / files.UNFINISHED).exists()
        or (folder / "tmp").exists()
    ):
        raise CheckpointError(f"{folder} is an interrupted conversion; run the conversion again")
    zero = folder / files.ZERO
    if not (zero / files.OPTIMIZER_STATE).exists():
        native = any(folder.glob("*_optim_states.pt"))
        raise CheckpointError(
            f"{folder} is no universal checkpoint "
            + (
                f"but one of engine.save_checkpoint; python -m adapprox_ds convert {folder} "
                f"{folder}_universal makes one of it"
                if native
                else f"({zero / files.OPTIMIZER_STATE} is missing); give the folder itself or a "
                f"run's root with a latest_universal file, which python -m adapprox_ds convert "
                f"{folder} OUTPUT writes for a run of engine.save_checkpoint"
            )
        )
    manifest = files.read(folder / files.MANIFEST) if (folder / files.MANIFEST).exists() else None
    if manifest is not None and manifest.get("format_version") != files.FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / files.MANIFEST} has format version {manifest.get('format_version')!r}; "
            f"this release of adapprox_ds reads {files.FORMAT_VERSION}: install the release "
            f"that wrote it ({manifest.get('package_version')}) or newer, or convert again"
        )
    state = files.read(zero / files.OPTIMIZER_STATE)
    base = state.get("optimizer_state_dict") or {}
    groups = state.get("param_groups") or base.get("param_groups")
    if not groups:
        raise CheckpointError(f"{zero / files.OPTIMIZER_STATE} holds no param_groups")
    names = {path.parent.relative_to(zero).as_posix() for path in zero.glob(f"*/{files.FP32}")}
    if manifest is None:
        loose = {name for name in names if not (zero / name / files.EXP_AVG_SQ).exists()}
        return UniversalFolder(folder, names - loose, groups, state, loose=loose)
    if missing := sorted(set(manifest["parameters"]) - names):
        raise CheckpointError(
            f"{folder} lacks {files.ZERO}/{missing[0]}/{files.FP32} and {len(missing) - 1} more "
            "that its manifest lists: copy it again"
        )
    return UniversalFolder(
        folder,
        names,
        groups,
        state,
        {name: group for name, (_, group) in manifest["parameters"].items()},
        {name: tuple(shape) for name, shape in manifest["frozen"].items()},
        {name: tuple(shape) for name, shape in manifest["buffers"].items()},
        {name: tuple(shape) for name, (shape, _) in manifest["parameters"].items()},
        manifest["source"],
    )
