# SPDX-License-Identifier: Apache-2.0
"""Chooses a DeepSpeed configuration for a model, a number of GPUs and their memory.

Combinations of settings are tried in order, first those that cost nothing, then those that cost
precision or time. The first whose bytes (:mod:`adapprox_ds.report.estimate`) fit is taken, and a
reason is given for each choice.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.adapprox.presets import PRESETS
from adapprox_ds.checkpoint.inspect import sized
from adapprox_ds.report.estimate import (
    DTYPES,
    MAX_WORLD,
    PERSISTENCE_THRESHOLD,
    Estimate,
    estimate,
)
from adapprox_ds.report.model_shapes import Shapes, load_shapes
from adapprox_ds.report.state_bytes import FP32
from adapprox_ds.zero import configuration

#: The forms of the first moment that train equally well (README), from the largest to the smallest.
FIRST_MOMENTS = ("fp32", "bf16", "int8")
#: The ZeRO stage, whether the optimizer is on the CPU, the master weights and the forms of the
#: first moment, in the order in which they are tried: what costs time comes last, and before it
#: what costs precision of the weights.
_WAYS: tuple[tuple[int, bool, str, tuple[str, ...]], ...] = (
    (2, False, "fp32", FIRST_MOMENTS),
    (3, False, "fp32", FIRST_MOMENTS),
    (2, False, "compensated", FIRST_MOMENTS[-1:]),
    (3, False, "compensated", FIRST_MOMENTS[-1:]),
    # On the CPU there is no need for a small first moment.
    (2, True, "fp32", FIRST_MOMENTS[:1]),
    (3, True, "fp32", FIRST_MOMENTS[:1]),
)
#: DeepSpeed's two keys for master weights in bf16, both of which have to be set.
_BF16_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
#: The part of a GPU's memory for activations and communication buffers, unless the caller gives it.
ACTIVATIONS_PART = 0.2
#: DeepSpeed's optimizers with the parameters that mean the same for Adapprox.
_ADAMS = ("adam", "adamw", "torchadam", "fusedadam")
_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")
#: Settings of ZeRO with which a process has other bytes than are counted here.
_UNCOUNTED = ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights")
#: The rank that is written out: the default.
_RANK = Hyperparameters().rank_max
#: The largest number of GPUs that is tried when a refusal says how many would be enough.
_MOST_GPUS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """A combination of settings, and the bytes that it needs for each GPU.

    Attributes:
        stage: the ZeRO stage.
        offload: whether the optimizer and its weights are on the CPU.
        first_moment: the form of the first moment, a key of ``state_bytes.FIRST_MOMENTS``.
        masters: the form of the weights that the optimizer updates, a key of ``MASTERS``.
        dtype: the dtype of weights and gradients.
        states: the bytes that are on a GPU all the time.
        step: further bytes on a GPU during the optimizer's step: the gradients in the masters'
            dtype.
        host: the bytes on the CPU for each GPU.
        optimizer: the bytes of the optimizer's state, which ``states`` or ``host`` contains.
        adamw: the bytes that AdamW's state would have.
    """

    stage: int
    offload: bool
    first_moment: str
    masters: str
    dtype: str
    states: int
    step: int
    host: int
    optimizer: int
    adamw: int

    @property
    def words(self) -> str:
        """A description without the first moment."""
        masters = ", compensated bf16 masters" if self.masters == "compensated" else ""
        return f"stage {self.stage}{masters}{', optimizer on the CPU' if self.offload else ''}"

    def needs(self, activations: int) -> int:
        """The peak bytes of a GPU; there are no activations during the optimizer's step."""
        return self.states + max(activations, self.step)


@dataclass(frozen=True, slots=True)
class Configured:
    """The result of :func:`configure`.

    Attributes:
        config: a complete DeepSpeed configuration.
        reasons: a line with the reason for each choice.
    """

    config: dict[str, Any]
    reasons: list[str]


def configure(
    model: str,
    *,
    gpus: int,
    memory: int,
    activations: int | None = None,
    first_moment: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Configured:
    """Choose a configuration that fits.

    Args:
        model: the model, as for :func:`~adapprox_ds.report.model_shapes.load_shapes`.
        gpus: the number of GPUs, each with one process of data parallelism.
        memory: the bytes of a GPU's memory.
        activations: the bytes of a GPU to reserve for activations and communication buffers; by
            default ``ACTIVATIONS_PART`` of its memory.
        first_moment: the form of the first moment; None for the largest of ``FIRST_MOMENTS`` that
            fits.
        base: a DeepSpeed configuration, of which only "optimizer" is replaced; None for a new one.

    Raises:
        ValueError: an argument or the base cannot be used, or nothing fits; the message says by how
            much.
    """
    _require("gpus", gpus, isinstance(gpus, int) and 1 <= gpus <= MAX_WORLD, f"1 to {MAX_WORLD}")
    _require("memory", memory, isinstance(memory, int) and memory > 0, "a positive number of bytes")
    room = int(ACTIVATIONS_PART * memory) if activations is None else activations
    _require("activations", room, isinstance(room, int) and 0 <= room < memory, "less than memory")
    allowed = (*FIRST_MOMENTS, "int4")
    known = first_moment is None or first_moment in allowed
    _require("first_moment", first_moment, known, ", ".join(allowed))
    kept = None if base is None else _Kept.of(base)
    shapes = load_shapes(model)
    choices = list(_choices(shapes, gpus, kept, first_moment))
    chosen = next((c for c in choices if c.needs(room) <= memory), None)
    if chosen is None:
        raise ValueError(_refusal(model, shapes, gpus, memory, room, choices, kept, first_moment))
    numel = sum(map(math.prod, shapes.values()))
    source = " (a fifth; --activations)" if activations is None else ""
    reasons = [
        f"{model}: {numel / 1e6:,.2f} M parameters on {gpus} GPU{'s' * (gpus > 1)} of "
        f"{sized(memory)}, of which {sized(room)} are left to activations and buffers{source}"
    ]
    if kept is None:
        config = _new(chosen)
        reasons += _reasons(chosen, choices, room, first_moment)
    else:
        config = copy.deepcopy(dict(base or {}))
        config["optimizer"] = {"type": "Adapprox", "params": kept.params(chosen)}
        reasons += [*kept.notes, _of_first_moment(chosen, choices, room, kept, first_moment)]
    reasons.append(_of_memory(chosen, gpus, memory, room))
    reasons.append("in the script: adapprox_ds.initialize in place of deepspeed.initialize")
    return Configured(config, reasons)


def read_base(path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration from its file, as DeepSpeed does.

    Raises:
        ValueError: there is no such file, or it is no configuration.
    """
    if not Path(path).is_file():
        raise ValueError(f"configure: --from {path}: no such file")
    try:
        _, config = configuration.load(None, path, None)
    except Exception as error:  # of any kind that the reader of JSON raises
        raise ValueError(f"configure: --from {path} cannot be read: {error}") from error
    return config


@dataclass(frozen=True, slots=True)
class _Kept:
    """The settings that a given configuration fixes, or one of ``_WAYS``.

    Attributes:
        stage: the ZeRO stage.
        offload: whether the optimizer is on the CPU.
        masters: the form of the weights that the optimizer updates, a key of ``MASTERS``.
        dtype: the dtype of weights and gradients.
        offloads_weights: whether the model's own weights are on the CPU too.
        wide_gradients: whether gradients are accumulated in fp32, whatever the dtype is.
        persistence_threshold: the number of elements up to which stage 3 keeps whole parameters.
        given: the parameters for Adapprox from the configuration's optimizer.
        notes: lines that say which settings were used and which were not.
    """

    stage: int
    offload: bool
    masters: str
    dtype: str = "bf16"
    offloads_weights: bool = False
    wide_gradients: bool = False
    persistence_threshold: int = PERSISTENCE_THRESHOLD
    given: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, base: Mapping[str, Any]) -> _Kept:
        """Read the settings of a DeepSpeed configuration.

        Raises:
            ValueError: Adapprox refuses a setting, or its bytes are not counted here.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            configuration.refuse(base, "Adapprox")
        zero = base.get("zero_optimization") or {}
        for key in _UNCOUNTED:
            if zero.get(key) not in (None, False, -1, 1):
                raise ValueError(
                    f"configure: zero_optimization.{key}={zero[key]!r} is not allowed: its bytes "
                    "are not counted; leave it out"
                )
        stage = zero.get("stage", 0)
        _require("zero_optimization.stage", stage, stage in (0, 1, 2, 3), "0, 1, 2 or 3")
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        weights = (zero.get("offload_param") or {}).get("device", "none") != "none"
        given, notes = _taken_over(base.get("optimizer") or {})
        notes += [f"note: {warning.message}" for warning in caught]
        # "auto" is replaced by the Trainer; it is counted as true, as GPUs train in 16 bits.
        enabled = {x: (base.get(x) or {}).get("enabled", False) for x in ("bf16", "fp16")}
        dtype = next((x for x, on in enabled.items() if on is True), None)
        if dtype is None and "auto" in enabled.values():
            dtype = next(x for x, on in enabled.items() if on == "auto")
            notes.append(f'{dtype}.enabled = "auto": counted as true')
        masters = "fp32"
        if dtype == "bf16" and all((base.get("bf16") or {}).get(name) for name in _BF16_MASTERS):
            masters = "compensated" if given.get("weight_rounding") == "compensated" else "bf16"
        accumulated = (base.get("data_types") or {}).get("grad_accum_dtype")
        threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        if threshold == "auto":
            notes.append("stage3_param_persistence_threshold: counted as DeepSpeed's default")
            threshold = PERSISTENCE_THRESHOLD
        return cls(
            stage=stage,
            offload=offload,
            offloads_weights=weights,
            dtype=dtype or "fp32",
            masters=masters,
            wide_gradients=accumulated == "fp32",
            persistence_threshold=threshold,
            given=given,
            notes=notes,
        )

    def params(self, chosen: Choice) -> dict[str, Any]:
        """The parameters of the new "optimizer" block."""
        if chosen.first_moment in ("none", _settings(self.given)["first_moment"]):
            return dict(self.given)
        return {**self.given, "first_moment": chosen.first_moment}


def _taken_over(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parameters of an "optimizer" block that Adapprox can use, and notes about all of them.

    Raises:
        ValueError: the optimizer is neither Adapprox nor an Adam, or Adapprox refuses a parameter.
    """
    kind, params = str(block.get("type", "")), dict(block.get("params") or {})
    if not kind:
        return {"lr": _new_params()["lr"]}, [
            "optimizer: none in the config; lr = 3e-4 is one for AdamW: take your own"
        ]
    if kind.lower() == "adapprox":
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float32, device="cpu"))
        try:
            Adapprox([p], **{name: value for name, value in params.items() if value != "auto"})
        except TypeError as error:
            raise ValueError(f"configure: optimizer.params: {error}") from error
        return params, ["optimizer: Adapprox's own parameters are kept"]
    if kind.lower() not in _ADAMS:
        raise ValueError(
            f"configure: optimizer.type={kind!r} is not allowed: its learning rate means something "
            "else to Adapprox; allowed: Adam, AdamW, Adapprox, or no optimizer block"
        )
    kept = {name: params[name] for name in _ADAM_PARAMS if name in params}
    notes = [f"optimizer: {kind}'s {', '.join(kept) or 'defaults'} mean the same in Adapprox"]
    if left := [name for name in params if name not in kept]:
        notes.append(f"optimizer: {', '.join(left)} left out: Adapprox has no such parameter")
    if params.get("adam_w_mode") is False and params.get("weight_decay"):
        notes.append("optimizer: weight_decay was added to the gradient and is now decoupled")
    return kept, notes


def _choices(
    shapes: Shapes,
    gpus: int,
    kept: _Kept | None,
    asked: str | None,
    only_last: bool = False,
) -> Iterator[Choice]:
    """Yield all combinations of settings in the order in which they are tried.

    Args:
        shapes: the shapes of the model's parameters.
        gpus: the number of GPUs.
        kept: the settings that a given configuration fixes; None without one.
        asked: the first moment that the user wants; None for any.
        only_last: whether to yield the last combination only.

    Raises:
        ValueError: the given configuration has no first moment, and the user wants one.
    """
    if kept is None:
        for stage, offload, masters, kinds in _WAYS[-1:] if only_last else _WAYS:
            for first_moment in kinds if asked is None else (asked,):
                yield _choice(shapes, gpus, _Kept(stage, offload, masters), first_moment)
        return
    settings = _settings(kept.given)
    kind = "none" if settings["betas"][0] == 0 else settings["first_moment"]
    smaller = kind in FIRST_MOMENTS and "preset" not in kept.given
    if asked is not None and kind == "none":
        raise ValueError(
            f"configure: first_moment={asked!r} is not allowed with betas[0] = 0 in the given "
            "config, which needs none; allowed: betas[0] > 0"
        )
    kinds = FIRST_MOMENTS[FIRST_MOMENTS.index(kind) :] if smaller else (kind,)
    if asked is not None:
        kinds = (asked,)
    for first_moment in kinds[-1:] if only_last else kinds:
        yield _choice(shapes, gpus, kept, first_moment)


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine the bytes of the state, with defaults and presets filled in."""
    defaults = Hyperparameters()
    names = ("betas", "rank_max", "first_moment", "factor_dtype", "scope", "right_factor")
    known = {name: getattr(defaults, name) for name in names}
    known |= PRESETS.get(str(given.get("preset")), {})
    known |= {name: value for name, value in given.items() if value != "auto"}
    if known["scope"] != "matrix":
        known["right_factor"] = None
    return {name: known[name] for name in names}


def _choice(shapes: Shapes, gpus: int, kept: _Kept, first_moment: str) -> Choice:
    settings, offload, dtype = _settings(kept.given), kept.offload, kept.dtype
    rank = settings["rank_max"]
    found = _estimated(
        tuple(shapes.items()),
        stage=kept.stage,
        world=gpus,
        ranks=(rank,),
        dtype=dtype,
        masters=kept.masters,
        first_moment=first_moment,
        persistence_threshold=kept.persistence_threshold,
        **{name: settings[name] for name in ("factor_dtype", "scope", "right_factor")},
    )
    adamw = next(o for o in found.peers if o.name == "AdamW").largest
    optimizer = found.adapprox[rank].largest
    # DeepSpeed counts so too (runtime/zero/stage_1_and_2.py and stage3.py,
    # *_model_states_mem_needs): with offload and from stage 2 on, gradients leave the GPU as soon
    # as they are computed, and are in fp32 on the CPU.
    on_gpu, on_host = (0, found.parameters) if kept.offloads_weights else (found.parameters, 0)
    if not (offload and kept.stage >= 2):
        on_gpu += found.gradients * (FP32 // DTYPES[dtype] if kept.wide_gradients else 1)
    step = 0 if offload or kept.stage == 0 else found.master
    if offload:
        on_host += 2 * found.master + optimizer
    else:
        on_gpu += found.master + optimizer
    fixed = (kept.stage, offload, first_moment, kept.masters, dtype)
    return Choice(*fixed, on_gpu, step, on_host, optimizer, adamw)


@lru_cache(maxsize=64)
def _estimated(shapes: tuple[tuple[str, tuple[int, ...]], ...], **options: Any) -> Estimate:
    """:func:`estimate` with hashable arguments, since choices are estimated more than once."""
    return estimate(dict(shapes), **options)


def _new_params() -> dict[str, Any]:
    return {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "rank_max": _RANK}


def _new(chosen: Choice) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": chosen.stage}
    if chosen.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    bf16: dict[str, Any] = {"enabled": True}
    params = _new_params() | {"first_moment": chosen.first_moment}
    if chosen.masters == "compensated":
        bf16 |= dict.fromkeys(_BF16_MASTERS, True)
        params["weight_rounding"] = "compensated"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adapprox", "params": params},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": bf16,
    }


def _reasons(
    chosen: Choice, tried: Sequence[Choice], room: int, asked: str | None
) -> Iterator[str]:
    """Yield the reasons for a new configuration.

    Args:
        chosen: the choice that is taken.
        tried: all choices, in the order in which they were tried.
        room: the bytes that are reserved for activations.
        asked: the first moment that the user wants; None for any.
    """
    # For each combination that was tried before, the bytes with its smallest first moment.
    least: dict[str, int] = {}
    for choice in tried[: tried.index(chosen)]:
        needs = choice.needs(room)
        least[choice.words] = min(needs, least.get(choice.words, needs))
    least.pop(chosen.words, None)
    why = "; ".join(f"{words} needs {sized(needs)}" for words, needs in least.items())
    fits = "it fits, and stage 3 sends more" if chosen.stage == 2 else "it fits"
    yield f"zero_optimization.stage = {chosen.stage}: {why or fits}"
    if chosen.offload:
        yield "zero_optimization.offload_optimizer = cpu: nothing fits without; steps take longer"
    else:
        yield "zero_optimization.offload_optimizer: none, it fits without"
    yield _of_first_moment(chosen, tried, room, None, asked)
    if chosen.masters == "compensated":
        yield (
            "bf16.bf16_master_weights_and_grads = true: the optimizer's weights in bf16 too, with "
            'weight_rounding = "compensated" a byte more of each'
        )
    else:
        yield "bf16.enabled = true: weights and gradients in bf16, the optimizer's weights in fp32"
    yield "optimizer.params: lr = 3e-4, betas, weight_decay = 0.1 are ones for AdamW: take your own"
    yield f"optimizer.params.rank_max = {_RANK}: Adapprox's default"
    yield "train_micro_batch_size_per_gpu = 1: raise it until the memory is full"


def _of_first_moment(
    chosen: Choice, tried: Sequence[Choice], room: int, kept: _Kept | None, asked: str | None
) -> str:
    line = f'optimizer.params.first_moment = "{chosen.first_moment}": '
    if asked is not None:
        return line + "as you asked"
    if chosen.first_moment == "none":
        return line + "beta_1 is 0"
    alike = [c for c in tried if c.words == chosen.words]
    larger = alike[: alike.index(chosen)]
    if not larger:
        if chosen.first_moment != FIRST_MOMENTS[0] and kept is None:
            return line + "trains as fp32 does within noise"
        return line + ("it fits" if kept is None else "it fits as it was")
    needs = ", ".join(f'"{c.first_moment}" needs {sized(c.needs(room))}' for c in larger)
    return f"{line}{needs}; trains as fp32 does within noise"


def _of_memory(chosen: Choice, gpus: int, memory: int, room: int) -> str:
    where = "on the CPU" if chosen.offload else "of these"
    line = (
        f"a GPU holds {sized(chosen.states)} of states, and with {sized(max(room, chosen.step))} "
        f"for activations, or the step's buffers, {sized(chosen.needs(room))} of {sized(memory)}; "
        f"the optimizer's state is {sized(chosen.optimizer)} {where}, AdamW's would be "
        f"{sized(chosen.adamw)}"
    )
    if chosen.host:
        all_of_them = sized(gpus * chosen.host)
        line += f"; the CPU holds {sized(chosen.host)} a GPU, {all_of_them} for all of them"
    return line


def _refusal(
    model: str,
    shapes: Shapes,
    gpus: int,
    memory: int,
    room: int,
    choices: Sequence[Choice],
    kept: _Kept | None,
    asked: str | None,
) -> str:
    """The message that nothing fits: by how much the smallest choice is too large, and a remedy."""
    least = min(choices, key=lambda c: c.needs(room))
    line = (
        f"configure: {model} does not fit on {gpus} GPU{'s' * (gpus > 1)} of {sized(memory)}: at "
        f'least, with {least.words} and first_moment="{least.first_moment}", a GPU needs '
        f"{sized(least.needs(room))} ({sized(least.states)} of states, {sized(room)} left to "
        f"activations), {sized(least.needs(room) - memory)} too much"
    )
    if kept is not None:
        free = next(
            (c for c in _choices(shapes, gpus, None, asked) if c.needs(room) <= memory), None
        )
        if free is not None and free.dtype == kept.dtype:
            return f'{line}; {free.words} with first_moment="{free.first_moment}" fits'
    more = gpus * 2
    while more <= _MOST_GPUS:
        # With many GPUs the last choice is the smallest.
        (smallest,) = _choices(shapes, more, kept, asked, only_last=True)
        if smallest.needs(room) <= memory:
            return f"{line}; {more} GPUs are enough"
        more *= 2
    return line


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"configure: {name}={value!r} is not allowed; allowed: {allowed}")
