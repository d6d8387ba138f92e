# SPDX-License-Identifier: Apache-2.0
"""Every wrapper and option against the algorithms on the same parts. Run by test_stages.py.

What lies where is derived here from DeepSpeed's published rules, not from its tables or ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

import adapprox_ds
from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.micro_adam.tensors import WindowSquare
from tests.adapprox.oracle import FragmentOracle, most_square
from tests.methods import BLOCKS, COMPARED, DECAY, METHODS
from tests.micro_adam.micro_oracle import MicroFragmentOracle, MicroSettings
from tests.models import (
    SHAPES,
    KnownGradients,
    coefficient,
    start_value,
    trainable,
    untied_coefficient,
)

STEPS = 6
Z2 = {"stage": 2}
Z3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
CPU = {"offload_optimizer": {"device": "cpu"}}
Oracle = FragmentOracle | MicroFragmentOracle


@dataclass
class Case:
    """One training run and how to check it.

    Attributes:
        zero: the "zero_optimization" block; None for stage 0.
        precision: "fp32", "bf16", "fp16", "bf16_fp32acc" (BF16_Optimizer), or "bf16_masters" (the
            optimizer's own weights and gradients are in bf16).
        how: "initialize" (JSON), "instance", "callable" or "registered".
        accumulation: gradient accumulation steps.
        clipping: gradient_clipping.
        zero_init: build the model under deepspeed.zero.Init.
        overflow_at: the step at which gradients are infinite.
        method: one of METHODS.
        knobs: hyper-parameters in place of the method's.
        extra: more config keys.
    """

    zero: dict[str, Any] | None = None
    precision: str = "fp32"
    how: str = "initialize"
    accumulation: int = 1
    clipping: float = 0.0
    zero_init: bool = False
    overflow_at: int | None = None
    method: str = "default"
    knobs: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type[Adapprox] | type[MicroAdam]:
        """The optimizer."""
        return MicroAdam if self.method.startswith("micro") else Adapprox

    def coefficient(self, name: str, step: int) -> Tensor:
        """A parameter's gradient."""
        return (untied_coefficient if self.cls is MicroAdam else coefficient)(name, step)

    @property
    def arguments(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return {"weight_decay": 0.1, **(self.knobs or METHODS[self.method][0])}

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return (self.zero or {}).get("stage", 0)

    @property
    def misleads(self) -> bool:
        """Whether DeepSpeed's own look-up of full tensors is wrong (round-robin order)."""
        return bool((self.zero or {}).get("round_robin_gradients"))


def config_of(case: Case) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.extra,
    }
    if case.zero is not None:
        config["zero_optimization"] = case.zero
    if case.precision.startswith("bf16"):
        config["bf16"] = {"enabled": True}
    if case.precision == "bf16_masters" and case.stage == 0:
        del config["bf16"]  # the model itself is
    elif case.precision == "bf16_masters":
        names = ("enabled", "bf16_master_weights_and_grads", "bf16_optimizer_states")
        config["bf16"] = dict.fromkeys(names, True)
    if case.precision == "bf16_fp32acc":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.precision == "fp16":
        # Stage 0 never scales the loss (DeepSpeed), so only a scale of 1 gives true gradients.
        fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1}
        config["fp16"] = fp16 if case.stage else {"enabled": True, "loss_scale": 1}
    if case.how in ("initialize", "registered"):
        config["optimizer"] = {"type": case.cls.__name__, "params": case.arguments}
    return config


def start(case: Case, mpu: Any = None) -> tuple[Any, KnownGradients]:
    """A model and its engine, built in the case's way."""
    torch.manual_seed(0)
    config = config_of(case)
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = KnownGradients()
        for name, cell in model.cells.items():
            with deepspeed.zero.GatheredParameters([cell.weight], modifier_rank=0):
                if SHAPES[name] != (0,):
                    cell.weight.data.copy_(start_value(name))
    else:
        model = KnownGradients()
        model.set_start_values()
    if case.precision == "bf16_masters" and case.stage == 0:
        model.bfloat16()
    model.coefficient = case.coefficient
    members = {name: cell.weight for name, cell in model.cells.items()}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in members.items() if n in DECAY]},
        {"params": [p for n, p in members.items() if n not in DECAY], "weight_decay": 0.0},
    ]
    if case.how == "initialize":
        engine = adapprox_ds.initialize(
            model=model, model_parameters=groups, config=config, mpu=mpu
        )[0]
        return engine, model
    if case.how == "registered":
        adapprox_ds.register()
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
        return engine, model
    build = partial(case.cls, **case.arguments)
    optimizer = build if case.how == "callable" else build(groups)
    parameters = groups if case.how == "callable" else None
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, config=config, mpu=mpu
    )[0]
    return engine, model


def cuts(case: Case, world: int) -> dict[str, list[tuple[int, int]]]:
    """Where each parameter is cut, [begin, end) by rank, from DeepSpeed's rules of layout."""
    names = [n for n in SHAPES if n not in ("frozen", "empty")]
    sizes = {n: math.prod(SHAPES[n]) for n in names}
    if case.stage == 0 and case.precision != "bf16_fp32acc":
        return {n: [(0, sizes[n])] for n in names}
    if case.stage == 3:
        ranges = {}
        for n in names:
            slot = math.ceil(sizes[n] / world)
            spans = [(r * slot, min((r + 1) * slot, sizes[n])) for r in range(world)]
            ranges[n] = [span for span in spans if span[0] < span[1]]
        return ranges
    zero = case.zero or {}
    ranges = {n: [] for n in names}
    for group in ([n for n in names if n in DECAY], [n for n in names if n not in DECAY]):
        if zero.get("round_robin_gradients"):
            group = [n for j in range(world) for n in group[j::world]]
        unit = {"fp32": 4}.get(case.precision, 8) if zero.get("parameter_alignment") else 1
        place, end = {}, 0
        for n in group:
            place[n] = math.ceil(end / unit) * unit
            end = place[n] + sizes[n]
        size = math.ceil(end / (2 * world)) * 2
        for n in group:
            for r in range(world):
                lo = max(place[n], r * size) - place[n]
                hi = min(place[n] + sizes[n], (r + 1) * size) - place[n]
                if lo < hi:
                    ranges[n].append((lo, hi))
    return ranges


def oracles(case: Case, world: int) -> dict[str, list[Oracle]]:
    """A naive optimizer for each fragment of each parameter."""
    made: dict[str, list[Oracle]] = {}
    for n, spans in cuts(case, world).items():
        s = replace(METHODS[case.method][1], decay=0.1 if n in DECAY else 0.0)
        w = start_value(n)
        if case.arguments.get("scope") == "matrix":
            spans = [(0, spans[-1][1])]
        if isinstance(s, MicroSettings):
            made[n] = [MicroFragmentOracle(w, s, a, b, torch.float32) for a, b in spans]
        else:
            made[n] = [FragmentOracle(oracle_name(case, n), w, s, a, b) for a, b in spans]
    return made


def oracle_name(case: Case, n: str) -> str:
    """The name that seeds a parameter's sketches: the model's, or its place if none was given."""
    if case.how == "initialize":
        return f"cells.{n}.weight"
    group = [m for m in SHAPES if (m in DECAY) == (n in DECAY)]
    return f"group{int(n not in DECAY)}.{group.index(n)}"


def full_value(engine: Any, p: Any, key: str | None) -> Tensor:
    """A parameter's fp32 master weight (key None) or optimizer state, whole."""
    wrapper = engine.optimizer
    if hasattr(p, "_hp_mapping") or hasattr(p, "ds_id"):
        full = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
        return full.detach().float()
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(sum(wrapper.fp16_groups, []), sum(wrapper.fp32_groups, []), strict=True)
        p = next(master for lp, master in pairs if lp is p)
    if key is None:
        return p.detach().float()
    state = wrapper.optimizer.state if hasattr(wrapper, "fp32_groups") else wrapper.state
    return (state[p][key] + 0.0).float()


def clip_factor(case: Case, step: int) -> float:
    """What gradient clipping multiplies the gradients of a step by."""
    if not case.clipping:
        return 1.0
    used = [n for n in SHAPES if n not in ("frozen", "empty", "unused")]
    norm = math.sqrt(sum(float(case.coefficient(n, step).square().sum()) for n in used))
    return min(1.0, case.clipping / (norm + 1e-6))


def train(engine: Any, case: Case, step: int) -> None:
    """One optimizer step; rank 0 alone has gradients, so that the mean over ranks is tested."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for _ in range(case.accumulation):
        factor = float(world) if rank == 0 else 0.0
        if step == case.overflow_at:
            factor = math.inf if rank == 0 else 0.0
        loss = engine(step, factor)
        engine.backward(loss)
        engine.step()


def advance(case: Case, naive: dict[str, list[Oracle]], step: int) -> None:
    """One step of every oracle."""
    for n, parts in naive.items():
        if n == "unused" and case.stage == 0 and case.precision == "fp32":
            continue  # plain torch: no gradient, no step
        g = case.coefficient(n, step) * clip_factor(case, step)
        if n == "unused":
            g = g * 0.0
        begin = 0
        for part in parts:
            end = begin + part.w.numel()
            part.step(g.reshape(-1)[begin:end])
            begin = end


def check(
    case: Case,
    engine: Any,
    model: KnownGradients,
    naive: dict[str, list[Oracle]],
    moments: float = 2e-4,
) -> None:
    """Weights, first and second moments, and errors, of every parameter against the oracles."""
    settings = adapprox_of(engine).param_groups[0]
    for n, p in trainable(model).items():
        parts = naive[n]
        if not any(part.t for part in parts):
            continue
        expected = {
            key: torch.cat([getattr(part, name) for part in parts])
            for key, name in COMPARED.items()
            if hasattr(parts[0], name)
        }
        if case.misleads:
            expected = {None: expected[None]}
        if settings.get("right_factor") == "sharded" and case.stage:
            expected.pop("exp_avg_sq", None)  # which no rank can read; later weights depend on it
        if settings.get("first_moment") == "none":
            expected.pop("exp_avg", None)
        for key, value in expected.items():
            full = p.detach() if case.misleads else full_value(engine, p, key)
            actual = full.reshape(-1).double()
            scale = float(value.abs().max()) + 1e-12
            error = float((actual - value).abs().max()) / scale
            bound = 2e-5 if key is None else moments
            assert error <= bound, f"{n} {key or 'weight'}: off by {error:.2e}, allowed {bound}"


def adapprox_of(engine: Any) -> Any:
    """The Adapprox or MicroAdam inside an engine."""
    wrapper = engine.optimizer
    return wrapper if isinstance(wrapper, ShardOptimizer) else wrapper.optimizer


def run(case: Case, folder: Path) -> None:
    """Train and compare after every step."""
    world = torch.distributed.get_world_size()
    engine, model = start(case)
    naive = oracles(case, world)
    if world > 1 and case.stage:
        inside = [
            n
            for n, spans in cuts(case, world).items()
            if (view := most_square(SHAPES[n]))
            and any(b % view[1] and b % BLOCKS["block_size"] for _, b in spans[:-1])
        ]
        assert inside, "no matrix is cut inside a row and a block: the case tests less than said"
    for step in range(STEPS):
        train(engine, case, step)
        if step != case.overflow_at:
            advance(case, naive, step)
        check(case, engine, model, naive)
    frozen = model.cells["frozen"].weight
    if case.stage != 3:
        assert torch.equal(frozen.detach().float(), start_value("frozen")), "frozen moved"
    optimizer = adapprox_of(engine)
    if case.precision != "fp32" or case.stage:
        moments = [s["exp_avg_sq"] for s in optimizer.state.values() if s]
        assert moments
        assert all(isinstance(m, LowRankMoment | WindowSquare) for m in moments)
    engine.destroy()


_CASES: dict[str, Case] = {
    "z0_fp32": Case(),
    "z0_bf16_paper": Case(precision="bf16", method="paper"),
    "z2_paper": Case(Z2, method="paper"),
    "z2_clipped": Case(Z2, "bf16", method="clipped"),
    "z3_clipped": Case(Z3, method="clipped"),
    "z2_fp16_overflow_paper": Case(Z2, "fp16", overflow_at=2, method="paper"),
    "z2_offload_paper": Case({**Z2, **CPU}, "bf16", method="paper"),
    "z3_sub_groups_paper": Case({**Z3, "sub_group_size": 200}, "bf16", method="paper"),
    "z0_fp32_instance": Case(how="instance"),
    "z0_bf16": Case(precision="bf16"),
    "z0_bf16_instance": Case(precision="bf16", how="instance"),
    "z0_fp16": Case(precision="fp16"),
    "bf16_optimizer": Case({"stage": 1}, "bf16_fp32acc"),
    "bf16_optimizer_instance": Case({"stage": 1}, "bf16_fp32acc", "instance"),
    "z1_fp32": Case({"stage": 1}),
    "z1_bf16_registered": Case({"stage": 1}, "bf16", "registered"),
    "z1_round_robin": Case({"stage": 1, "round_robin_gradients": True}),
    "z1_round_robin_instance": Case({"stage": 1, "round_robin_gradients": True}, how="instance"),
    "z2_fp32": Case(Z2),
    "z2_bf16_callable": Case(Z2, "bf16", "callable"),
    "z2_fp16_overflow": Case(Z2, "fp16", overflow_at=2),
    "z2_accumulate_clip": Case(Z2, accumulation=2, clipping=0.5),
    "z2_aligned": Case({**Z2, "parameter_alignment": True}, "bf16"),
    "z2_aligned_instance": Case({**Z2, "parameter_alignment": True}, "bf16", "instance"),
    "z2_round_robin_callable": Case({**Z2, "round_robin_gradients": True}, how="callable"),
    "z2_offload": Case({**Z2, **CPU}, "bf16"),
    "z2_offload_instance_clip": Case({**Z2, **CPU}, "fp32", "instance", clipping=0.5),
    "z3_fp32": Case(Z3),
    "z3_bf16_instance": Case(Z3, "bf16", "instance"),
    "z3_registered_accumulate": Case(Z3, how="registered", accumulation=2),
    "z3_fp16_overflow": Case(Z3, "fp16", overflow_at=2),
    "z3_sub_groups_clip": Case({**Z3, "sub_group_size": 200}, "bf16", clipping=0.5),
    "z3_init": Case(Z3, "bf16", zero_init=True),
    "z3_init_instance": Case({**Z3, "sub_group_size": 100}, "fp32", "instance", zero_init=True),
    "z3_offload": Case({**Z3, **CPU, "sub_group_size": 200}, "bf16"),
}
_CASES |= {
    f"micro_{name}": replace(_CASES[name], method="micro")
    for name in (
        "z0_fp32",
        "z0_bf16_instance",
        "bf16_optimizer",
        "z1_bf16_registered",
        "z1_round_robin_instance",
        "z2_bf16_callable",
        "z2_fp16_overflow",
        "z2_aligned_instance",
        "z2_offload",
        "z3_fp32",
        "z3_bf16_instance",
        "z3_sub_groups_clip",
        "z3_init",
        "z3_offload",
    )
}
for _name in ("z2_accumulate_clip", "z3_sub_groups_clip"):
    # Clipped gradients are rounded, and a code may then be the next one.
    _CASES[f"micro_{_name}"] = replace(_CASES[_name], method="micro_full")


CASES: dict[str, Callable[[Path], None]] = {name: partial(run, c) for name, c in _CASES.items()}
