# SPDX-License-Identifier: Apache-2.0
"""Files of a universal checkpoint: their names, reading them without trust, writing them whole."""

from __future__ import annotations

import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Version of the folder's layout and of the manifest; raised when either changes meaning.
FORMAT_VERSION = 1

#: What only our converter writes; the stock loaders pass them by.
MANIFEST, BUFFERS, FROZEN = "adapprox.pt", "buffers.pt", "frozen"
#: Present from the converter's first moment until everything else is in place.
UNFINISHED = "INCOMPLETE"
#: Appended to the output's name while the converter works.
PARTIAL_SUFFIX = ".incomplete"

ZERO, OPTIMIZER_STATE = "zero", "optimizer_state.pt"
FP32, EXP_AVG, EXP_AVG_SQ, STEP = "fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"
ERROR = "error.pt"
#: What MatrixViews' class holds of a parameter.
VIEWED = "viewed.pt"
LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, converted or loaded; names the file and the remedy."""


def deepspeed_globals() -> list[Any]:
    """Classes that DeepSpeed puts in checkpoints and that are safe to load."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # Python before 3.11.4 writes a member of an enumeration as getattr(its class, its name).
    return [*classes, (_member, "builtins.getattr")]


def _member(kind: Any, name: str) -> Enum:
    """What ``getattr`` may do while a checkpoint is read: name a member of an enumeration."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is no member of an enumeration")
    return kind.__members__[name]


def read(path: Path, *, trusted: bool = False) -> Any:
    """Load a file; its tensors are mapped, not read, until they are used.

    Args:
        path: a file that ``torch.save`` wrote.
        trusted: unpickle anything in it, which can run any code, as ``engine.load_checkpoint``
            does.

    Raises:
        CheckpointError: the file is missing, truncated or no such file, or holds objects that
            are not safe to load.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; copy it again")
    try:
        with torch.serialization.safe_globals([] if trusted else deepspeed_globals()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds an object that is not safe to load: {_first_line(error)}. If you trust "
            "its writer (a client_state of your own), wrap the call in "
            "torch.serialization.safe_globals([its class]), or let it run any code by trusted=True "
            "(--trust on the command line)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_first_line(error)}): truncated, damaged or of another "
            "release; copy or convert the checkpoint again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def write(path: Path, value: Any) -> None:
    """Save ``value`` so that the file is whole or absent, whenever the process ends.

    Raises:
        CheckpointError: it cannot be written: the disk is full, for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    partial.replace(path)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """What to say where a file cannot be written."""
    return CheckpointError(
        f"{path} cannot be written ({_first_line(error)}): make room on its disk, and convert again"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent, whenever the process ends."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
    except OSError as error:
        raise unwritable(path, error) from error
    partial.replace(path)


def compact(tensor: Tensor) -> Tensor:
    """The tensor with a storage of its own, so that saving a slice does not save the whole."""
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone().contiguous()


def resolve(folder: str | os.PathLike[str], latest: str) -> Path:
    """The folder itself, or, given the root of a run, the one that its ``latest`` file names.

    Raises:
        CheckpointError: there is no such folder.
    """
    path = Path(folder)
    pointer = path / latest
    if pointer.is_file():
        path = path / pointer.read_text().strip()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give that of a checkpoint, or a run's root")
    return path
