# SPDX-License-Identifier: Apache-2.0
"""Compiles C++ kernels for the CPU at hand, once, as DeepSpeed does with its own CPU optimizers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: ``enum Format`` of narrow.h, of weights and gradients.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Where headers are that the libraries share.
SHARED = Path(__file__).parent
#: No -ffast-math: NaN and infinity have to come through.
_FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-march=native"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
#: Not used by compilers on their own where a CPU might lower its clock for it.
_WIDE = "-mprefer-vector-width=512"


class NativeUnavailableError(RuntimeError):
    """The compiled passes cannot be had on this machine; says why."""


@dataclass(frozen=True, eq=False)
class Library:
    """C++ kernels that are compiled together.

    Attributes:
        name: of the compiled file.
        files: the source, and then the headers that it includes.
        flags: the compiler's, beside those of all libraries.
    """

    name: str
    files: tuple[Path, ...]
    flags: tuple[str, ...] = ()


@cache
def load(library: Library) -> ctypes.CDLL:
    """A compiled library.

    It is kept in ``$TORCH_EXTENSIONS_DIR`` or ``~/.cache/torch_extensions``, where torch and
    DeepSpeed keep theirs, under a name made of the source, the compiler and the CPU's instruction
    sets: machines of several kinds may share a home. Ranks that build at the same time do not wait
    for each other; each puts a complete file in place. The compiler is ``$CXX``, and gets
    ``$CXXFLAGS`` last.

    Raises:
        NativeUnavailableError: there is no compiler, or it fails; names the remedy.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler was found: install one, or set CXX")
    asked = shlex.split(os.environ.get("CXXFLAGS", ""))
    sets = [compiler, "-march=native", "-fopenmp", *asked, "-dM", "-E", "-x", "c++", os.devnull]
    macros = _run(sets)
    wide = [_WIDE] if "__AVX512F__" in macros else []
    flags = (*_FLAGS, *library.flags, *wide, *asked)
    built_from = (*(file.read_text() for file in library.files), macros, *flags)
    name = hashlib.blake2b("\0".join(built_from).encode(), digest_size=8).hexdigest()
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default) / "adapprox_ds"
    path = folder / f"{library.name}_{name}.so"
    if not path.exists():
        _build([compiler, *flags, f"-I{SHARED}", str(library.files[0])], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded ({error}): remove it") from error


def _build(command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            _run([*command, "-o", str(built)])
            built.replace(path)
    except OSError as error:
        raise NativeUnavailableError(
            f"{path} cannot be written ({error}): set TORCH_EXTENSIONS_DIR to a folder that can"
        ) from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeUnavailableError(f"{command[0]} cannot be run ({error}): set CXX") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NativeUnavailableError(f"{command[0]} cannot compile the kernels ({last})")
    return done.stdout


def addresses(tensors: Sequence[Tensor]) -> Any:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
