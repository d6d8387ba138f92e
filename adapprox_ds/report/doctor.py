# SPDX-License-Identifier: Apache-2.0
"""Examines a machine and, on request, a DeepSpeed configuration, as ``ds_report`` does.

It reports versions, the kernels that each optimizer would use, the time of a step, and what
DeepSpeed and this package would make of the configuration. Nothing is trained, and no process group
is made.
"""

from __future__ import annotations

import difflib
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapprox_ds._version import __version__
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.core.kernels import backends, self_check
from adapprox_ds.micro_adam.kernels import native_windows
from adapprox_ds.zero import configuration
from adapprox_ds.zero.register import OPTIMIZERS

#: The side and the number of the matrices whose step is timed.
_SIDE, _COUNT = 1024, 4
#: The advice for a configuration of another optimizer.
_JOIN = "; name Adapprox there, or run adapprox-ds configure --from"
#: The C++ library that is the backend "native" of each optimizer.
_LIBRARIES = {"Adapprox": native_pass.LIBRARY, "MicroAdam": native_windows.LIBRARY}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        what: the subject.
        found: what was found, in words.
        fails: whether something that the user asked for would not work.
    """

    what: str
    found: str
    fails: bool = False


def examine(config: str | Path | None = None, seconds: float = 5.0) -> list[Finding]:
    """Examine this machine and, on request, a DeepSpeed configuration.

    Args:
        config: the path of a DeepSpeed configuration.
        seconds: the time to spend on timing, approximately; with 0 no step is timed.

    Returns:
        The findings, in the order in which they are printed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [*_versions(), _device(device), *_backends(device)]
    if seconds > 0:
        found.append(_timing(device, seconds))
        verdicts = sorted(self_check.verdicts().items())
        found += [Finding(f"kernel {form}", verdict) for form, verdict in verdicts]
    if config is not None:
        found += _of_config(Path(config))
    return found


def table(findings: list[Finding]) -> str:
    """The findings as text; a line that fails begins with an exclamation mark."""
    width = max(len(f.what) for f in findings)
    return "\n".join(f"{'!' if f.fails else ' '} {f.what:{width}}  {f.found}" for f in findings)


def _versions() -> Iterator[Finding]:
    yield Finding("adapprox-ds", f"{__version__}, Python {platform.python_version()}")
    yield Finding("torch", torch.__version__)
    for name in ("deepspeed", "triton", "transformers"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed")
            continue
        if name == "deepspeed":
            from adapprox_ds.zero import compat

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compat.warn_untested.__wrapped__(version)
            version = "; ".join([version, *(str(w.message) for w in caught)])
        yield Finding(name, version)


def _device(device: torch.device) -> Finding:
    if device.type == "cpu":
        return Finding(
            "device", f"CPU, {torch.get_num_threads()} threads; no GPU that torch can use"
        )
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    name = torch.cuda.get_device_name(device)
    return Finding("device", f"{name}, capability {major}.{minor}, {memory:.0f} GiB")


def _backends(device: torch.device) -> Iterator[Finding]:
    """Yield for each optimizer the backend of its kernels, and why the others are not available."""
    for owner, library in _LIBRARIES.items():
        try:
            words = [backends.chosen(device, library)]
            fails = False
        except (RuntimeError, ValueError) as error:
            words, fails = [str(error)], True
        for other in ("native", "triton"):
            reason = backends.missing(other, device, library)
            if reason is not None:
                words.append(f"not {other}: {reason}")
        yield Finding(f"kernels of {owner}", "; ".join(words), fails)


def _timing(device: torch.device, seconds: float) -> Finding:
    """Time steps of Adapprox and of torch's fused AdamW in turns.

    Returns:
        The median ratio of their times and its range.
    """

    def parameters() -> list[torch.nn.Parameter]:
        zeros = torch.zeros(_COUNT, _SIDE, _SIDE, device=device, dtype=torch.float32)
        made = [torch.nn.Parameter(x) for x in zeros]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    def timed(optimizer: torch.optim.Optimizer) -> float:
        begin = time.perf_counter()
        optimizer.step()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    ours = Adapprox(parameters(), lr=1e-4, rank_min=8, rank_init=8, rank_max=8)
    theirs = torch.optim.AdamW(parameters(), lr=1e-4, fused=True)
    for _ in range(3):  # the first steps compile, and take two passes
        timed(ours)
        timed(theirs)
    ratios: list[float] = []
    end = time.monotonic() + seconds
    while len(ratios) < 3 or (time.monotonic() < end and len(ratios) < 100):
        ratios.append(timed(ours) / timed(theirs))
    return Finding(
        "time of a step",
        f"{median(ratios):.1f} x fused AdamW's ({min(ratios):.1f} to {max(ratios):.1f}), "
        f"k = 8, {_COUNT} matrices of {_SIDE} x {_SIDE}",
    )


def _of_config(path: Path) -> Iterator[Finding]:
    """Yield what DeepSpeed and this package would make of a configuration."""
    if not path.is_file():
        yield Finding("config", f"{path}: no such file", fails=True)
        return
    try:
        _, config = configuration.load(None, str(path), None)
    except Exception as error:  # of any kind that the reader of JSON raises
        yield Finding("config", f"{path} cannot be read: {error}", fails=True)
        return
    block: dict[str, Any] = config.get("optimizer") or {}
    kind = str(block.get("type", ""))
    named = OPTIMIZERS.get(kind.lower())
    zero = config.get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    floats = [x for x in ("bf16", "fp16") if (config.get(x) or {}).get("enabled")]
    yield Finding(
        "config",
        f"ZeRO stage {zero.get('stage', 0)}, optimizer offload {offload}, "
        f"{floats[0] if floats else 'fp32'}",
    )
    known = configuration.known_sections()
    for name in config.keys() - known:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            yield Finding(
                "config",
                f"{name!r} is no key of DeepSpeed's; did you mean {near[0]!r}? It is ignored as it "
                "is",
                fails=True,
            )
    if kind and named is None:
        yield Finding("optimizer", f"DeepSpeed's {kind}: this package takes no part" + _JOIN)
        return
    owner = named.__name__ if named is not None else "Adapprox"
    if named is None:
        yield Finding("optimizer", "none in the config: what the script passes to initialize")
    else:
        try:
            p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float32, device="cpu"))
            made: Any = named([p], **block.get("params", {}))
            yield Finding("optimizer", f"{owner}, by adapprox_ds.initialize: {_settings(made)}")
        except (TypeError, ValueError) as error:
            yield Finding("optimizer", str(error), fails=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            configuration.refuse(config, owner)
        except ValueError as error:
            yield Finding("combination", str(error), fails=True)
    for warning in caught:
        yield Finding("note", str(warning.message))


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's settings that determine memory and quality, as text."""
    group = optimizer.param_groups[0]
    names = ("lr", "weight_decay", "rank_max", "first_moment", "scope", "window", "density")
    return ", ".join(f"{name}={group[name]}" for name in names if name in group)
