# SPDX-License-Identifier: Apache-2.0
"""How Adapprox's state, or an Adam's, is converted, and loaded into a running Adapprox.

See :mod:`adapprox_ds.checkpoint.family`. The second moment of the whole parameter is in factors
where an Adapprox saved it, and dense where an Adam did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors, FactorStore
from adapprox_ds.adapprox.fragment import write_mean
from adapprox_ds.adapprox.hyperparameters import CODE_BITS, Hyperparameters
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.quantized import QuantizedMoment
from adapprox_ds.adapprox.reshard import Piece, RankTarget, join, piece_of, reshard
from adapprox_ds.adapprox.state import (
    factor_dtype,
    first_moment_pieces,
    new_first_moment,
    plain_dtype,
)
from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import Family, StateSize, register
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder
from adapprox_ds.checkpoint.moments import (
    GRADIENT,
    SHARED_KEYS,
    UPDATE,
    Normalisation,
    is_adam,
    is_adapprox,
    kind_of,
    shared_settings,
)
from adapprox_ds.checkpoint.native import VIEWS, NativeCheckpoint, SavedParameter
from adapprox_ds.checkpoint.place import Placement
from adapprox_ds.core.rounding import rounding_salt
from adapprox_ds.core.shards import Shard
from adapprox_ds.core.state import FIRST_MOMENT, SECOND_MOMENT, STEP, compute_dtype

#: The settings by which the paper's algorithm differs from the default step. If the run's
#: ``warm_start`` differs from the saved one, all of these stay as the run has them, and the second
#: moment is factored anew.
_METHOD = (
    *("warm_start", "power_iterations", "rank_policy", "floor", "clip_threshold"),
    *("momentum", "nesterov", "bias_correction", "guidance"),
)

#: The number of elements of a first moment that are converted at a time. As many elements of the
#: second moment are made dense meanwhile.
_CHUNK = 1 << 22


@register
class FactoredState(Family):
    """A first moment of gradients or of updates, and a second moment, factored or dense."""

    optimizers = ("Adapprox",)

    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a parameter group is Adapprox's or an Adam's."""
        return VIEWS not in group and (is_adapprox(group) or is_adam(group))

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """The optimizer, and what its first moment is the mean of."""
        name = "Adapprox" if any(is_adapprox(group) for group in groups) else "Adam"
        kinds = [f"{kind_of(group)}s" for group in groups]
        if len(set(kinds)) == 1:
            return f"{name}, first moment of {kinds[0]}"
        return f"{name}, first moments by group: {', '.join(kinds)}"

    def merge(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> dict[str, Tensor]:
        """Both moments; the second is in the factors that were saved, unless ``dense``."""
        second = _second_moment(checkpoint, parameter)
        firsts = [m for p in parameter.parts if (m := checkpoint.first_moment(p)) is not None]
        # It is written in full precision, so that every loader can read it.
        first = torch.cat([m.to(compute_dtype(m.dtype)) for m in firsts]) if firsts else None
        if dense:
            group = checkpoint.groups[parameter.group]
            second = second.to_dense() if isinstance(second, LowRankMoment) else second
            if first is None:
                first = torch.zeros_like(second)
            elif kind_of(group) == UPDATE:
                adam = Normalisation.of_group(shared_settings(group), step)
                first = adam.to_gradients(first, second)
        held = {} if first is None else {files.EXP_AVG: first}
        return {**held, files.EXP_AVG_SQ: second}

    def tensor_files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """The files of the moments; there is no first moment where beta_1 is 0."""
        first = (files.EXP_AVG,) if source.has_first_moment(name) else ()
        return (*first, files.EXP_AVG_SQ)

    def kept_settings(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """``_METHOD`` where ``warm_start`` differs, and settings that only an Adam has."""
        kept: set[str] = set()
        if saved.get("warm_start", group["warm_start"]) != group["warm_start"]:
            kept |= set(_METHOD)
        if not is_adapprox(saved):
            kept |= set(saved) - set(SHARED_KEYS)
        return kept

    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> FactoredPlan:
        """The factors that fit a shard's layout."""
        h = Hyperparameters.of_group(settings[shard.group])
        target = RankTarget(h.rank_control, h.rank_init, h.domain)
        dtype, device = compute_dtype(shard.flat.dtype), shard.flat.device
        kept_in = factor_dtype(shard.flat.dtype, h)
        factors: list[Factors] = []
        dense: list[tuple[int, Tensor]] = []
        for part in shard.layout.fragments:
            name = place.names[part.fragment.name]
            whole = source.second_moment(name)
            if whole.factors and whole.domain != target.domain and part.block is not None:
                _log_domain(name, whole.domain, target.domain)
            piece = reshard(whole, part, target)
            for f in piece.factors:
                f.q, f.u = f.q.to(device, kept_in), f.u.to(device, kept_in)
            factors.extend(piece.factors)
            dense.extend((offset, values.to(device, dtype)) for offset, values in piece.runs)
        runs = tuple((offset, values.numel()) for offset, values in dense)
        held = (
            torch.cat([v for _, v in dense])
            if dense
            else torch.empty(0, dtype=dtype, device=device)
        )
        store = FactorStore(shard.layout.numel, factors, runs, held, target.domain)
        step = source.step_of_shard(place.names[f] for f in shard.names)
        return FactoredPlan(
            shard, step, LowRankMoment(store, shard.flat.shape, shard.flat.dtype), h
        )

    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """The ranks of the factors and the bytes of the state, over all processes."""
        pieces: list[Tensor | Piece] = []
        first = 0
        for part in parameter.parts:
            moment = checkpoint.second_moment(part.process, part.flat)
            pieces.append(
                piece_of(moment.store, part.fragment)
                if isinstance(moment, LowRankMoment)
                else part.fragment.view(moment)
            )
            m = checkpoint.first_moment(part)
            first += checkpoint.compensation_bytes(part) + (0 if m is None else _first_bytes(m))
        return _size(pieces, first)

    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """The ranks of the factors and the bytes of the files' tensors."""
        second = source.tensor(name, files.EXP_AVG_SQ)
        first = source.tensor(name, files.EXP_AVG).nbytes if source.has_first_moment(name) else 0
        return _size([second], first)


@dataclass(slots=True)
class FactoredPlan:
    """The new state of a shard.

    Attributes:
        shard: the shard.
        step: the number of steps done.
        moment: the new second moment, shaped like the shard.
        settings: the settings of the shard's group after the load.
    """

    shard: Shard
    step: int
    moment: LowRankMoment
    settings: Hyperparameters

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put the second moment into the optimizer's state, and write the first moment.

        The first moment is read from the file here, and converted where the run keeps the other
        kind. That of padding stays zero.
        """
        flat = self.shard.flat
        state = place.optimizer.state[flat]
        state[STEP] = torch.tensor(float(self.step), dtype=torch.float32, device="cpu")
        state[SECOND_MOMENT] = self.moment
        held = state.pop(FIRST_MOMENT, None)
        if settings["betas"][0] == 0:
            return
        state[FIRST_MOMENT] = _empty_first_moment(held, self)
        pieces = first_moment_pieces(state[FIRST_MOMENT], self.shard.layout)
        del held
        saved = source.groups[self.shard.group]
        for i, part in enumerate(self.shard.layout.fragments):
            f = part.fragment
            name = place.names[f.name]
            if not source.has_first_moment(name):
                continue  # beta_1 was 0, so the mean begins now
            values = source.tensor(name, files.EXP_AVG).reshape(-1)[f.start : f.start + f.numel]
            if kind_of(saved) != kind_of(settings):
                dtype = compute_dtype(values.dtype)
                out = torch.empty(values.shape, dtype=dtype, device=values.device)
                second = source.second_moment(name)
                _convert(values, second, f.start, (saved, settings), self.step, out)
                values = out
            write_mean(part, pieces[i], values.to(flat.device), rounding_salt(self.step))


def _second_moment(checkpoint: NativeCheckpoint, parameter: SavedParameter) -> Tensor:
    """The second moment of a whole parameter, (numel,), joined from the parts that were saved.

    Returns:
        A ``LowRankMoment`` with the saved factors, or a dense tensor.

    Raises:
        CheckpointError: the processes' factors do not approximate the same quantity.
    """
    flats = [checkpoint.second_moment(p.process, p.flat) for p in parameter.parts]
    factored = [flat for flat in flats if isinstance(flat, LowRankMoment)]
    if len(factored) < len(flats):
        # An Adam saved it, or it was loaded dense and no step was made since.
        values = [p.fragment.view(t) for p, t in zip(parameter.parts, flats, strict=True)]
        return torch.cat([v.to_dense() if isinstance(v, LowRankMoment) else v for v in values])
    domains = {flat.store.domain for flat in factored}
    if len(domains) != 1:
        raise CheckpointError(
            f"the factors in {checkpoint.folder} approximate different things for "
            f"{parameter.name!r}: {sorted(domains)}; files of several saves are mixed"
        )
    pairs = zip(factored, parameter.parts, strict=True)
    pieces = [piece_of(flat.store, part.fragment) for flat, part in pairs]
    store = join(parameter.numel, pieces, domains.pop()).map(files.compact)
    return LowRankMoment(store, (parameter.numel,), flats[0].dtype)


def _log_domain(name: str, saved: str, configured: str) -> None:
    from deepspeed.utils import logger

    logger.warning(
        f"{name}: the checkpoint's factors are those of the {saved}, the optimizer's of the "
        f"{configured}; its blocks are factored anew, one dense tile at a time"
    )


def _empty_first_moment(held: Tensor | None, plan: FactoredPlan) -> Tensor:
    """A first moment of zeros in the form that the settings ask for.

    The present tensor is zeroed and used again where it has that form. DeepSpeed keeps references
    to it, so it would otherwise stay allocated beside the new one.

    Args:
        held: the present first moment; None where there is none.
        plan: the plan of the shard.
    """
    flat, h = plan.shard.flat, plan.settings
    if held is None or isinstance(held, QuantizedMoment) or h.first_moment in CODE_BITS:
        return new_first_moment(flat, plan.shard.layout, h)
    if (held.shape, held.dtype) != (flat.shape, plain_dtype(flat, h)):
        return new_first_moment(flat, plan.shard.layout, h)
    return held.zero_()


def _convert(
    values: Tensor,
    second: FactorStore,
    start: int,
    groups: tuple[Mapping[str, Any], Mapping[str, Any]],
    step: int,
    out: Tensor,
) -> None:
    """Convert a fragment's first moment to the other kind, a chunk at a time.

    Args:
        values: the first moment, (numel,).
        second: the whole parameter's second moment.
        start: the index in the flattened parameter of the fragment's first element.
        groups: the saved parameter group, and the settings after the load.
        step: the number of steps done.
        out: receives the result, (numel,).
    """
    saved, new = groups
    from_gradients = kind_of(saved) == GRADIENT
    dtype = compute_dtype(values.dtype)
    normalisation = Normalisation.of_group(saved if from_gradients else new, step)
    change = normalisation.to_updates if from_gradients else normalisation.to_gradients
    for a in range(0, values.numel(), _CHUNK):
        b = min(a + _CHUNK, values.numel())
        out[a:b].copy_(change(values[a:b], second.read(start + a, start + b, dtype)))


def _first_bytes(piece: Tensor) -> int:
    if isinstance(piece, QuantizedMoment):
        return piece.store.bytes_between(piece.start, piece.start + piece.numel())
    return piece.nbytes


def _size(parts: Sequence[Tensor | Piece], first: int) -> StateSize:
    blocks: list[Factors] = []
    second = 0
    for part in parts:
        if isinstance(part, Piece):
            blocks += part.factors
            second += sum(b.q.nbytes + b.u.nbytes for b in part.factors)
            second += sum(values.nbytes for _, values in part.runs)
        elif isinstance(part, LowRankMoment):
            blocks += part.store.factors
            second += part.allocated_bytes
        else:
            second += part.nbytes
    ranks = tuple(b.q.shape[1] for b in blocks)
    errors = [b.error for b in blocks if not math.isnan(b.error)]
    return StateSize(second, first, ranks, max(errors, default=math.nan))
