# SPDX-License-Identifier: Apache-2.0
"""The files of checkpoints: their names, reading them safely, and writing them completely."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

#: The version of the folder's layout and of the manifest. It is raised when either changes meaning.
FORMAT_VERSION = 1

#: Files and a folder that only our converter writes; DeepSpeed's loaders ignore them.
MANIFEST, BUFFERS, FROZEN = "adapprox.pt", "buffers.pt", "frozen"
#: A file that exists from the beginning of a conversion until all other files are complete.
UNFINISHED = "INCOMPLETE"
#: The suffix of the output folder's name while the converter works.
PARTIAL_SUFFIX = ".incomplete"

ZERO, OPTIMIZER_STATE = "zero", "optimizer_state.pt"
FP32, EXP_AVG, EXP_AVG_SQ, STEP = "fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"
ERROR = "error.pt"
#: The state of a parameter in the class that MatrixViews wraps.
VIEWED = "viewed.pt"
LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, converted or loaded; the message names file and remedy."""


def deepspeed_globals() -> list[Any]:
    """Classes that DeepSpeed puts in checkpoints and that are safe to load."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # Python before 3.11.4 pickles a member of an enumeration as getattr(its class, its name).
    return [*classes, (_member, "builtins.getattr")]


def _member(kind: Any, name: str) -> Enum:
    """A replacement for ``getattr`` in pickles, which only gives members of enumerations."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is no member of an enumeration")
    return kind.__members__[name]


def read(path: Path, *, trusted: bool = False) -> Any:
    """Load a file on the CPU; its tensors are memory-mapped, so that only those used are read.

    Args:
        path: a file that ``torch.save`` wrote.
        trusted: whether to unpickle objects of any class, which can run any code, as
            ``engine.load_checkpoint`` does.

    Raises:
        CheckpointError: the file is missing, damaged or was not written by ``torch.save``, or it
            contains objects that are not safe to load.
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
    """Save ``value`` by ``torch.save``; see :func:`_write`."""
    _write(path, lambda file: torch.save(value, file))


def write_text(path: Path, text: str) -> None:
    """Write a text file; see :func:`_write`."""
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it is complete or absent, whenever the process ends.

    Args:
        path: the file; its folder is made where there is none.
        fill: writes the content to an open file.

    Raises:
        CheckpointError: it cannot be written; the disk is full, for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    partial.replace(path)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be written."""
    return CheckpointError(
        f"{path} cannot be written ({_first_line(error)}): make room on its disk, and convert again"
    )


def compact(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its size, as ``torch.save`` writes all of a tensor's storage."""
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone().contiguous()


def resolve(folder: str | os.PathLike[str], latest: str) -> Path:
    """The folder of a checkpoint.

    Args:
        folder: the checkpoint itself, or a run's root with a file that names the checkpoint.
        latest: the name of that file.

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
