# SPDX-License-Identifier: Apache-2.0
"""Ten steps equal five steps, save, new processes, load, five steps. Run by test_resume.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.quantized import QuantizedMoment
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.micro_adam.tensors import WindowMean
from tests.models import KnownGradients
from tests.world import release_of
from tests.zero.cases_stages import CPU, Z2, Z3, Case, adapprox_of, start, train

HALF = 5
#: A threshold that some blocks' errors are above and some below, so that ranks move.
KNOBS: dict[str, Any] = {
    "rank_init": 2,
    "rank_max": 4,
    "rank_step": 2,
    "error_threshold": 0.05,
    "oversampling": 2,
    "lr": 1e-2,
}
PAPER = {**KNOBS, "preset": "paper", "power_iterations": 1}
EXPAND = {**KNOBS, "rank_policy": "expand", "rank_init": 1, "rank_interval": 4}

RUNS: dict[str, Case] = {
    "z0_fp32": Case(knobs=KNOBS),
    "z0_bf16": Case(precision="bf16", knobs=KNOBS),
    "bf16_optimizer": Case({"stage": 1}, "bf16_fp32acc", knobs=KNOBS),
    "z1_instance": Case({"stage": 1}, "bf16", "instance", knobs=KNOBS),
    "z2_fp16": Case(Z2, "fp16", knobs=KNOBS),
    "z2_offload": Case({**Z2, **CPU}, "bf16", knobs=KNOBS),
    "z2_paper": Case(Z2, knobs=PAPER),
    "z1_matrix": Case({"stage": 1}, "bf16", knobs={**KNOBS, "scope": "matrix"}),
    "z3": Case(Z3, knobs=KNOBS),
    "z3_sub_groups": Case({**Z3, "sub_group_size": 200}, "bf16", "instance", knobs=KNOBS),
    # What else the state can be kept in, at every stage and with all masters,
    # tests/zero/cases_cover.py resumes as well.
    "z2_offload_int8_moment": Case({**Z2, **CPU}, "fp16", knobs={**KNOBS, "first_moment": "int8"}),
    "z3_update_bf16_moment": Case(
        Z3, "bf16", knobs={**KNOBS, "momentum": "update", "first_moment": "bf16"}
    ),
    "z3_masters": Case(Z3, "bf16_masters", knobs={**KNOBS, "weight_rounding": "compensated"}),
    "z0_masters": Case(None, "bf16_masters", knobs=KNOBS),
    "z3_expand": Case(Z3, knobs={**PAPER, **EXPAND}),
    "z3_guided": Case(Z3, "bf16", knobs={**KNOBS, "guidance": "cosine"}),
    **{
        f"micro_{name}": Case(zero, precision, how, method="micro")
        for name, zero, precision, how in (
            ("z0_bf16", None, "bf16", "instance"),
            ("bf16_optimizer", {"stage": 1}, "bf16_fp32acc", "initialize"),
            ("z1_masters", {"stage": 1}, "bf16_masters", "instance"),
            ("z2_fp16", Z2, "fp16", "initialize"),
            ("z3_sub_groups", {**Z3, "sub_group_size": 200}, "bf16", "instance"),
            ("z3_offload", {**Z3, **CPU}, "bf16", "initialize"),
        )
    },
    "micro_z2_full": Case(Z2, method="micro_full"),
}


def saved_momentum(name: str) -> str:
    """What the first moment of a run is the mean of."""
    arguments = RUNS[name].arguments
    return arguments.get("momentum", "update" if "preset" in arguments else "gradient")


def held(first: torch.Tensor | None) -> Any:
    """What a first moment is physically."""
    if first is None:
        return None
    if isinstance(first, WindowMean):
        return first.store.indices.clone(), first.store.values.clone(), first.store.step
    if isinstance(first, QuantizedMoment):
        return first.store.codes.clone(), first.store.scales.clone()
    return first.clone()


def kept_rest(state: dict[str, Any], parts: list[Any]) -> list[torch.Tensor]:
    """What rounding took from the weights, without padding."""
    rest = state.get("compensation")
    if rest is None:
        return []
    return [rest.reshape(-1)[f.offset : f.offset + f.numel].clone() for f in parts]


def compact(state: dict[str, Any]) -> dict[str, Any]:
    """What the rest of a state is physically."""
    if "error" in state:
        assert state["exp_avg_sq"].store.window is state["exp_avg"].store, "two windows"
        error = state["error"].store
        return {"error": [t.clone() for t in (error.codes, error.low, error.high)]}
    store = state["exp_avg_sq"].store
    store.settle()
    blocks = [(b.q.clone(), b.u.clone(), b.rank, b.error) for b in store.factors]
    return {"dense": store.dense.clone(), "blocks": blocks}


def snapshot(engine: Any) -> dict[str, Any]:
    """All that this rank's optimizer is made of."""
    flats = []
    optimizer = adapprox_of(engine)
    for p, state in optimizer.state.items():
        parts = [part.fragment for part in optimizer.shards.layouts[p].fragments]
        weight = p.detach().reshape(-1)
        flats.append(
            {
                # Without padding: ZeRO-3's is memory that nobody initialised.
                "weight": [weight[f.offset : f.offset + f.numel].clone() for f in parts],
                "step": state["step"].clone(),
                "exp_avg": held(state.get("exp_avg")),
                "rest": kept_rest(state, parts),
                **compact(state),
            }
        )
    return {"flats": flats}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two snapshots are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        return [d for k in a for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where} length {len(a)} != {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} != {b}"]


def first_half(name: str, folder: Path) -> None:
    """Train unbroken for ten steps; apart from that for five, and save."""
    rank = torch.distributed.get_rank()
    engine, _ = start(RUNS[name])
    for step in range(2 * HALF):
        train(engine, RUNS[name], step)
    reference = snapshot(engine)
    if RUNS[name].cls is Adapprox:
        ranks = [b[2] for flat in reference["flats"] for b in flat["blocks"]]
        assert any(r != RUNS[name].knobs["rank_init"] for r in ranks), (
            "no rank moved: resume is not tested"
        )
    torch.save(reference, folder / f"reference{rank}.pt")
    engine.destroy()
    engine, _ = start(RUNS[name])
    for step in range(HALF):
        train(engine, RUNS[name], step)
        if step == 2 and "offload_optimizer" not in (RUNS[name].zero or {}):
            if RUNS[name].stage == 3:
                with pytest.raises(AssertionError, match="only for DeepSpeed FusedAdam"):
                    engine.offload_states(pin_memory=False)
            elif (
                RUNS[name].stage
                and RUNS[name].precision != "bf16_fp32acc"
                and release_of("deepspeed") >= (0, 17, 6)  # stage 3 alone before
            ):
                offloaded_for_a_while(engine)
    engine.save_checkpoint(str(folder / "checkpoint"))
    engine.destroy()


def offloaded_for_a_while(engine: Any) -> None:
    """``offload_states`` and back: what is compact stays so, in memory of its own.

    The states say that they lie on an accelerator, so that DeepSpeed takes the way it takes there,
    through buffers that its accelerator makes.
    """
    optimizer = adapprox_of(engine)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, CompactTensor):
                state[key] = torch.Tensor._make_wrapper_subclass(
                    type(value), value.shape, dtype=value.dtype, device="cuda"
                )
                state[key].store, state[key].start = value.store, 0
    kinds = [{k: type(v) for k, v in s.items()} for s in optimizer.state.values()]
    before = [s["exp_avg_sq"].store for s in optimizer.state.values()]
    engine.offload_states(pin_memory=False)
    states = list(optimizer.state.values())
    assert [{k: type(v) for k, v in s.items()} for s in states] == kinds
    for state, old in zip(states, before, strict=True):
        assert state["exp_avg_sq"].store is not old and state["exp_avg_sq"].device.type == "cpu"
        assert state["exp_avg_sq"].store.allocated_bytes == old.allocated_bytes
    engine.reload_states()
    assert [{k: type(v) for k, v in s.items()} for s in states] == kinds


def second_half(name: str, folder: Path) -> None:
    """Load into an engine whose weights are others, train on, compare with the unbroken run.

    It is configured with the other momentum: what its first moment is comes with its values. So
    do guidance and the size of the window.
    """
    ours = RUNS[name].cls is Adapprox
    momentum = "update" if saved_momentum(name) == "gradient" else "gradient"
    changed = {"momentum": momentum, "guidance": "none"} if ours else {"window": 7}
    if "preset" in RUNS[name].arguments:
        changed = {"clip_threshold": 2.0}  # the paper's algorithm has one momentum
    case = replace(RUNS[name], knobs={**RUNS[name].arguments, **changed})
    rank = torch.distributed.get_rank()
    scramble = KnownGradients.set_start_values

    def zeros(model: KnownGradients) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()

    KnownGradients.set_start_values = zeros  # type: ignore[method-assign]
    try:
        engine, _ = start(case)
    finally:
        KnownGradients.set_start_values = scramble  # type: ignore[method-assign]
    path, _ = engine.load_checkpoint(str(folder.parent / f"first_{name}" / "checkpoint"))
    assert path is not None
    if ours:
        found = {g["momentum"] for g in adapprox_of(engine).param_groups}
        assert found == {saved_momentum(name)}
        require_kept(engine, RUNS[name].arguments)
    for step in range(HALF, 2 * HALF):
        train(engine, case, step)
    reference = torch.load(folder.parent / f"first_{name}" / f"reference{rank}.pt")
    unequal = differences(reference, snapshot(engine))
    assert not unequal, unequal
    engine.destroy()


def require_kept(engine: Any, saved: dict[str, Any]) -> None:
    """What was loaded is kept as the saved run kept it."""
    optimizer, kept = adapprox_of(engine), saved.get("first_moment", "fp32")
    assert {g["first_moment"] for g in optimizer.param_groups} == {kept}
    short = saved.get("factor_dtype") == "bf16"
    for p, state in optimizer.state.items():
        blocks = state["exp_avg_sq"].store.factors
        assert all((t.dtype == torch.bfloat16) == short for b in blocks for t in (b.q, b.u))
        if kept == "none":
            assert "exp_avg" not in state
            continue
        first = state["exp_avg"]
        assert isinstance(first, QuantizedMoment) == (kept == "int8")
        if kept != "int8" and kept != "bf16":
            assert first.dtype == torch.promote_types(p.dtype, torch.float32)


CASES: dict[str, Callable[[Path], None]] = {
    **{f"first_{name}": partial(first_half, name) for name in RUNS},
    **{f"second_{name}": partial(second_half, name) for name in RUNS},
}
