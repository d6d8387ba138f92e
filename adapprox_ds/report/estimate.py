# SPDX-License-Identifier: Apache-2.0
"""Computes the bytes of weights, gradients and optimizer state on each process from shapes alone.

This is like DeepSpeed's ``estimate_zero2_model_states_mem_needs_all_live``, but exact for each
process's shard, and with the states of other optimizers for comparison. "Rank" is the rank of a
matrix's factors throughout; a member of a process group is a process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapprox_ds.adapprox.hyperparameters import FACTOR_DTYPES, Hyperparameters
from adapprox_ds.core.layout import RIGHT_FACTORS, SCOPES
from adapprox_ds.report.model_shapes import MODELS, load_shapes
from adapprox_ds.report.state_bytes import (
    FIRST_MOMENTS,
    FP32,
    MASTERS,
    Groups,
    OptimizerBytes,
    Scope,
    adapprox_bytes,
    flat_lengths,
    micro_adam_bytes,
    peer_bytes,
    second_moments,
)

Group = Mapping[str, Sequence[int]]

STAGES = (0, 1, 2, 3)
#: The bytes of an element of weights and gradients.
DTYPES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
#: The largest number of processes that is allowed, since an estimate has numbers of each.
MAX_WORLD = 2**20
#: The largest number of processes that the search for the crossover tries.
_LAST_WORLD = 2**16
#: The default of DeepSpeed's ``stage3_param_persistence_threshold``.
PERSISTENCE_THRESHOLD = 100_000
DEFAULT_RANKS = (Hyperparameters().rank_max,)
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Estimate:
    """The bytes on each process between steps, without buffers and activations.

    Attributes:
        stage: the ZeRO stage.
        world: the number of processes.
        dtype: the dtype of weights and gradients.
        masters: the form of the weights that the optimizer updates, a key of ``MASTERS``.
        numel: the number of elements of all parameters.
        parameters: the bytes on a process of the weights that forward and backward read.
        gradients: the bytes of the gradients that a process keeps until the step.
        master: the bytes on a process of the weights that the optimizer updates; 0 where they are
            the model's own.
        adapprox: Adapprox's state, by the largest rank.
        micro_adam: MicroAdam's state with its defaults. The window, from which both moments are
            computed, counts as the first moment, and the error feedback as the second.
        peers: the states of AdamW, Adafactor and AdamW8bit.
    """

    stage: int
    world: int
    dtype: str
    masters: str
    numel: int
    parameters: int
    gradients: int
    master: int
    adapprox: Mapping[int, OptimizerBytes]
    micro_adam: OptimizerBytes
    peers: tuple[OptimizerBytes, ...]

    def total(self, optimizer: OptimizerBytes) -> int:
        """All bytes, with an optimizer's state, on the process that has the most."""
        return self.parameters + self.gradients + self.master + optimizer.largest

    def table(self) -> str:
        """The estimate as text, in MiB."""
        rows = [("a process, in MiB", "1st moment", "2nd, largest", "2nd, mean", "state", "in all")]
        for name, n in (
            (f"parameters ({self.dtype})", self.parameters),
            (f"gradients ({self.dtype})", self.gradients),
            (f"{'fp32' if self.masters == 'fp32' else 'bf16'} master weights", self.master),
        ):
            rows.append((name, "", "", "", "", _mib(n)))
        for o in (*self.adapprox.values(), self.micro_adam, *self.peers):
            mean = sum(o.second) / self.world
            sizes = (max(o.first), max(o.second), mean, o.largest, self.total(o))
            first, largest, second, state, total = map(_mib, sizes)
            rows.append((o.name, first, largest, second, state, total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        processes = "1 process" if self.world == 1 else f"{self.world} processes"
        title = f"{self.numel / 1e6:.2f} M parameters, ZeRO stage {self.stage}, {processes}"
        if self.masters == "compensated":
            title += "; ours with a compensation of the weights, in state"
        return "\n".join([title, "", *lines])


@dataclass(frozen=True, slots=True)
class Crossover:
    """The numbers of processes from which on factoring a sharded second moment saves little.

    They are powers of two up to 65,536, found for the process with the most bytes. Factors are
    never larger than the dense shard, as a block's rank is limited. But each process keeps a row of
    U for every column, whatever the number of its rows is, so the saving shrinks as the rows are
    spread over more processes.

    Attributes:
        half: the number of processes from which on at most half of AdamW's second moment is saved;
            None if there is none.
        nothing: the number of processes from which on nothing is saved, since AdamW's shard of the
            second moment is no larger; None if there is none.
    """

    half: int | None
    nothing: int | None

    def __str__(self) -> str:
        half, nothing = (
            f"from {n} processes on" if n else "never" for n in (self.half, self.nothing)
        )
        return f"at most half is saved {half}, nothing {nothing}"


def estimate(
    shapes: Group | Sequence[Group],
    *,
    stage: int,
    world: int,
    ranks: Sequence[int] = DEFAULT_RANKS,
    dtype: str = "bf16",
    masters: str = "fp32",
    first_moment: str = "fp32",
    factor_dtype: str = "fp32",
    scope: str = "partition",
    right_factor: str | None = None,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
) -> Estimate:
    """Compute the bytes on each process.

    Args:
        shapes: the shapes of the trainable parameters by name, in the order of the optimizer; or a
            sequence of such mappings, one for each parameter group.
        stage: the ZeRO stage.
        world: the number of processes of data parallelism.
        ranks: the ranks to count Adapprox's state for. Every matrix has that rank, as with
            ``rank_max`` (and, by default, ``rank_init``) of that value, or the largest rank that
            saves memory for its rows.
        dtype: the dtype of weights and gradients, a key of ``DTYPES``.
        masters: the form of the weights that the optimizer updates, a key of ``MASTERS``. "bf16" is
            DeepSpeed's ``bf16_master_weights_and_grads`` (plain torch at stage 0), and
            "compensated" the same with ``weight_rounding="compensated"``; both need dtype="bf16".
        first_moment: the form of Adapprox's first moment, a key of ``FIRST_MOMENTS``.
        factor_dtype: the dtype of the factors, one of ``FACTOR_DTYPES``.
        scope: one of ``SCOPES``.
        right_factor: one of ``RIGHT_FACTORS``; None for Adapprox's default.
        persistence_threshold: the largest number of elements of parameters that stage 3 keeps whole
            on every process.

    Raises:
        ValueError: an argument is not allowed; the message has its value and what is allowed.
    """
    _require("stage", stage, stage in STAGES, "0, 1, 2 or 3")
    _require_integer("world", world, 1, MAX_WORLD)
    several = isinstance(ranks, Sequence) and len(ranks) > 0
    _require("ranks", ranks, several, "a sequence of integers >= 1")
    for rank in ranks:
        _require_integer("ranks", rank, 1)
    _require("dtype", dtype, dtype in DTYPES, ", ".join(DTYPES))
    _require("masters", masters, masters in MASTERS, ", ".join(MASTERS))
    narrow = masters == "fp32" or dtype == "bf16"
    _require("masters", masters, narrow, f'"fp32" with dtype={dtype!r}')
    kinds = ", ".join(FIRST_MOMENTS)
    _require("first_moment", first_moment, first_moment in FIRST_MOMENTS, kinds)
    kept_in = ", ".join(FACTOR_DTYPES)
    _require("factor_dtype", factor_dtype, factor_dtype in FACTOR_DTYPES, kept_in)
    spans = _scope_of(scope, right_factor)
    _require_integer("persistence_threshold", persistence_threshold, 0)
    groups = _groups_of(shapes)
    sizes = [math.prod(shape) for group in groups for shape in group]
    numel = sum(sizes)
    held = sum(n for group in groups for n in flat_lengths(group, stage, world))
    parameters = {0: numel, 1: held * world, 2: held * world, 3: held}[stage]
    if stage == 3 and world > 1:
        parameters += sum(n for n in sizes if n <= persistence_threshold)
    # The other stages make master weights even if the model's have the same dtype. Stage 3 is meant
    # not to, but does, since it compares a device with the name of one (runtime/zero/stage3.py,
    # _create_fp32_partitions).
    own = stage == 0 and (dtype == "fp32" or masters != "fp32")
    master = 0 if own else MASTERS[masters][0] * held
    return Estimate(
        stage=stage,
        world=world,
        dtype=dtype,
        masters=masters,
        numel=numel,
        parameters=DTYPES[dtype] * parameters,
        gradients=DTYPES[dtype] * (numel if stage <= 1 else held),
        master=master,
        adapprox={
            k: adapprox_bytes(groups, stage, world, k, first_moment, factor_dtype, spans, masters)
            for k in ranks
        },
        micro_adam=micro_adam_bytes(groups, stage, world, masters),
        peers=peer_bytes(groups, stage, world, masters),
    )


def crossover(
    shapes: Group | Sequence[Group],
    *,
    stage: int,
    rank: int,
    factor_dtype: str = "fp32",
    scope: str = "partition",
    right_factor: str | None = None,
) -> Crossover | None:
    """Find the numbers of processes from which on factoring the second moment saves little.

    Args:
        shapes: see :func:`estimate`, as for all arguments but ``rank``.
        stage: the ZeRO stage.
        rank: the rank of every matrix.
        factor_dtype: the dtype of the factors.
        scope: one of ``SCOPES``.
        right_factor: one of ``RIGHT_FACTORS``, or None.

    Returns:
        The numbers; None for stage 0, which shards nothing.
    """
    _require("stage", stage, stage in STAGES, "0, 1, 2 or 3")
    _require_integer("rank", rank, 1)
    spans = _scope_of(scope, right_factor)
    if stage == 0:
        return None
    groups = _groups_of(shapes)
    found: dict[int, int] = {}
    world = 1
    while world <= _LAST_WORLD:
        dense = FP32 * sum(n for group in groups for n in flat_lengths(group, stage, world))
        largest = max(second_moments(groups, stage, world, rank, factor_dtype, spans)[0])
        for share in (1, 2):
            if share * largest < dense:
                found.pop(share, None)
            else:
                found.setdefault(share, world)
        world *= 2
    return Crossover(half=found.get(2), nothing=found.get(1))


def report(
    model: str,
    *,
    stage: int,
    world: int,
    ranks: Sequence[int] | None = None,
    two_groups: bool = False,
    **options: Any,
) -> str:
    """The estimate and the crossovers of a model as text.

    Args:
        model: the model, as for :func:`~adapprox_ds.report.model_shapes.load_shapes`.
        stage: see :func:`estimate`.
        world: the number of processes.
        ranks: the ranks to count for; None for the default of Adapprox's ``rank_max``.
        two_groups: whether vectors are in a parameter group of their own, after the matrices.
        options: further arguments of :func:`estimate`.

    Raises:
        ValueError: an argument is not allowed; the message has its value and what is allowed.
    """
    ranks = DEFAULT_RANKS if ranks is None else ranks
    settings = {"stage": stage, "world": world, "ranks": ranks, **options}
    # Arguments that are not allowed are found before the model is read, which may take a while.
    estimate({"any": (1,)}, **settings)
    shapes = load_shapes(model)
    groups = [shapes]
    if two_groups:
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        groups = [matrices, {name: s for name, s in shapes.items() if name not in matrices}]
    lines = [f"{model}: {estimate(groups, **settings).table()}", ""]
    if stage == 0:
        lines.append("stage 0 shards nothing: the saving is the same on any number of processes")
        return "\n".join(lines)
    lines.append("2nd moment, fullest process, against AdamW's sharded one, to 65536 processes:")
    names = {"factor_dtype", "scope", "right_factor"} & options.keys()
    for k in ranks:
        met = crossover(groups, stage=stage, rank=k, **{name: options[name] for name in names})
        lines.append(f"  k = {k}: {met}")
    return "\n".join(lines)


#: The rows of a fit table: the form of the master weights, and that of Adapprox's first moment, or
#: None for AdamW.
_FITTED: tuple[tuple[str, str | None], ...] = (
    ("fp32", None),
    ("fp32", "fp32"),
    ("fp32", "int8"),
    ("fp32", "int4"),
    ("compensated", "int8"),
    ("bf16", "int8"),
    ("bf16", "int4"),
)


def fit(memory: int, *, world: int, rank: int = DEFAULT_RANKS[0]) -> str:
    """The largest of the built-in models that fits, for each setting and ZeRO stage, as text.

    The bytes are those of :func:`estimate` with weights and gradients in bf16, without activations.

    Args:
        memory: the bytes of a GPU's memory.
        world: the number of GPUs.
        rank: the rank of every matrix.

    Raises:
        ValueError: an argument is not allowed; the message has its value and what is allowed.
    """
    _require_integer("memory", memory, 1)
    _require_integer("world", world, 1, MAX_WORLD)
    models = sorted(MODELS, key=lambda name: sum(map(math.prod, load_shapes(name).values())))
    rows = [("weights, first moment", *(f"ZeRO-{stage}" for stage in STAGES))]
    for masters, kind in _FITTED:
        name = f"{masters} masters, " + ("AdamW" if kind is None else f"Adapprox {kind}")
        cells = []
        for stage in STAGES:
            fitting = "none"
            for model in models:
                found = estimate(
                    load_shapes(model),
                    stage=stage,
                    world=world,
                    ranks=[rank],
                    masters=masters,
                    first_moment=kind or "fp32",
                )
                total = found.total(found.peers[0] if kind is None else found.adapprox[rank])
                if total <= memory:
                    fitting = f"{model} ({total / 2**30:.1f} GiB)"
            cells.append(fitting)
        rows.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    gpus = "1 GPU" if world == 1 else f"{world} GPUs"
    title = (
        f"The largest model by name that fits {gpus} of {memory / 2**30:.0f} GiB, and what a "
        f"process holds: weights and gradients in bf16, k = {rank}; activations come on top"
    )
    return "\n".join([title, "", *lines])


def parse_size(text: str) -> int:
    """The bytes of a size such as "80GiB" (powers of 1024) or "80GB" (powers of 1000).

    Raises:
        ValueError: the text is no such size; the message says what is allowed.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b\s*", text, re.IGNORECASE)
    size = float(found[1]) if found else 0.0
    if not found or not size:
        raise ValueError(
            f"size {text!r} is not allowed; allowed: a positive number and a unit, "
            "KiB, MiB, GiB or TiB (powers of 1024), KB, MB, GB or TB (of 1000)"
        )
    return int(size * (1024 if found[3] else 1000) ** _UNITS[found[2].lower()])


def _scope_of(scope: str, right_factor: str | None) -> Scope:
    _require("scope", scope, scope in SCOPES, ", ".join(SCOPES))
    whole = scope == "matrix"
    allowed = RIGHT_FACTORS if whole else RIGHT_FACTORS[:1]
    said = ", ".join(allowed) + ("" if whole else ' without scope="matrix"')
    _require("right_factor", right_factor, right_factor in (None, *allowed), said)
    return scope, whole and right_factor != "replicated"


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"estimate: {name}={value!r} is not allowed; allowed: {allowed}")


def _require_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    sound = isinstance(value, int) and value >= low and (high is None or value <= high)
    allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    _require(name, value, sound, allowed)


def _groups_of(shapes: Group | Sequence[Group]) -> Groups:
    """The shapes by group, without parameters and groups that have no elements.

    DeepSpeed leaves those out too.

    Raises:
        ValueError: a shape is not allowed, or no parameter has elements.
    """
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    for group in groups:
        for name, shape in group.items():
            sound = all(isinstance(n, int) and n >= 0 for n in shape)
            _require(f"shapes[{name!r}]", shape, sound, "integers >= 0")
    found = tuple(tuple(tuple(s) for s in g.values() if math.prod(s)) for g in groups)
    _require("shapes", shapes, any(found), "at least one parameter with elements")
    return tuple(group for group in found if group)


def _mib(n: float) -> str:
    return f"{n / 2**20:,.2f}"
