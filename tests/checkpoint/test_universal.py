# SPDX-License-Identifier: Apache-2.0
"""Runs that move: between stages and world sizes, converters and optimizers.

``ADAPPROX_GRID=full`` takes the whole grid instead of the covering part of it.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from tests.checkpoint import (
    cases_frozen,
    cases_micro_moving,
    cases_momentum,
    cases_moving,
    cases_peaks,
    cases_switch,
)
from tests.checkpoint.cases_universal import GRID, KEPT, WORLDS_LOAD, WORLDS_SAVE
from tests.world import Started, run_worlds

Move = tuple[str, int, str, int]

#: Every source and every target once, crosswise.
COVER: list[Move] = [
    ("z1", 1, "z3", 4),
    ("z1", 2, "bf16", 1),
    ("z1", 3, "z2", 2),
    ("z2", 1, "z1", 4),
    ("z2", 2, "z3", 1),
    ("z2", 3, "bf16", 2),
    ("z3", 1, "bf16", 4),
    ("z3", 2, "z2", 1),
    ("z3", 3, "z1", 2),
    ("bf16", 1, "z2", 4),
    ("bf16", 2, "z1", 1),
    ("bf16", 3, "z3", 2),
]
#: Of DeepSpeed's own pattern (tests/unit/checkpoint/test_universal_checkpoint.py) the dtypes and
#: the small sub-groups; its worlds are in the full grid.
PATTERN: list[Move] = [
    ("z1_fp32", 3, "z1_fp32", 2),
    ("z1_fp16", 2, "z1_fp16", 1),
    ("z3_fp32", 2, "z3_fp32", 4),
    ("z3_fp16", 2, "z3_fp16", 2),
    ("z3_sub", 3, "z3_sub", 2),
]
#: Orders, alignments, zero.Init, offload, sub-groups, persistent parameters, stage 0.
OPTIONS: list[Move] = [
    ("z1_robin", 2, "z3", 1),
    ("z1_robin", 3, "z1_robin", 2),
    ("z3", 2, "z1_robin", 2),
    ("z2_aligned", 2, "z3_init", 2),
    ("z3_init", 2, "z2_aligned", 1),
    ("z3_init", 2, "z3_init", 4),
    ("z2_offload", 2, "z3_sub", 1),
    ("z3_sub", 2, "z2_offload", 4),
    ("z3_kept", 2, "z3_kept", 1),
    ("z1", 2, "z3_kept", 2),
    ("z3_kept", 2, "z0", 1),
    ("z1_paper", 2, "z3_paper", 1),
    ("z3_update", 2, "z1_update", 1),
    ("z2_mixed", 2, "z3_mixed", 1),
    ("z1", 2, "z3_m8_f32", 2),
    ("z1_m8_f32", 2, "z2", 1),
    ("z2_m16_f32", 2, "z3_short", 4),
    ("z1", 2, "z2_m32_f16", 1),
    ("z3_m32_f16", 2, "z1", 2),
]
#: MicroAdam's window and error, from and to every stage.
MICRO: list[Move] = [
    ("z1_micro", 2, "z1_micro", 2),
    ("z1_micro", 3, "z3_micro", 2),
    ("z1_robin_micro", 3, "z2_offload_micro", 2),
    ("z2_micro", 2, "z3_init_micro", 4),
    ("bf16_micro", 2, "z0_micro", 1),
    ("z3_micro", 2, "z1_micro", 4),
    ("z3_micro", 3, "bf16_micro", 2),
]
#: Every form of the state, from and to every stage; tests/zero/cases_cover.py has a part of it.
FORMS: list[Move] = [
    (f"{source}_{form}", a, f"{target}_{form}", b)
    for form in KEPT
    for source, a, target, b in (
        ("z1", 2, "z3", 1),
        ("z2", 3, "z1", 2),
        ("z3", 2, "z2", 4),
        ("z3", 2, "z0", 1),
    )
]
FULL: list[Move] = [
    *((s, a, t, b) for s in GRID for a in WORLDS_SAVE for t in GRID for b in WORLDS_LOAD),
    *(
        (f"{kind}{dtype}", a, f"{kind}{dtype}", b)
        for kind in ("z1", "z3")
        for dtype in ("", "_fp32", "_fp16", *(("_sub",) if kind == "z3" else ()))
        for a, b in ((2, 2), (4, 2), (2, 4))
    ),
]
MOVES = list(dict.fromkeys([*COVER, *PATTERN, *OPTIONS, *MICRO]))
if os.environ.get("ADAPPROX_GRID") == "full":
    MOVES = list(dict.fromkeys([*MOVES, *FORMS, *FULL]))

#: The cases of each module that run on two ranks; its others run on one.
ON_TWO: dict[ModuleType, list[str]] = {
    cases_frozen: list(cases_frozen.CASES),
    cases_micro_moving: ["micro_dense", "micro_table"],
    cases_momentum: [],
    cases_moving: [
        *("stock_load_z1", "stock_load_z3", "stock_convert_z1", "stock_convert_z3"),
        *("unnamed_z1", "faults_z3"),
    ],
    cases_peaks: ["memory_matrix"],
    cases_switch: [case for case in cases_switch.CASES if case != "fused_adam_z0"],
}


def name(move: Move) -> str:
    return "load_{}_{}_to_{}_{}".format(*move)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything saved first, then, in new processes, everything that loads it."""
    scratch = tmp_path_factory.mktemp("universal")
    saves: list[Started] = []
    for world in sorted({a for _, a, _, _ in MOVES}):
        kinds = dict.fromkeys(s for s, a, _, _ in MOVES if a == world)
        saves.append(
            (world, "tests.checkpoint.cases_universal", [f"save_{kind}_{world}" for kind in kinds])
        )
    loads: list[Started] = []
    for world in sorted({b for *_, b in MOVES}):
        cases = [name(move) for move in MOVES if move[3] == world]
        loads.append((world, "tests.checkpoint.cases_universal", cases))
    for module, on_two in ON_TWO.items():
        alone = [case for case in module.CASES if case not in on_two]
        worlds = ((1, alone), (2, on_two))
        loads += [(world, module.__name__, cases) for world, cases in worlds if cases]
    return run_worlds(saves, scratch) | run_worlds(loads, scratch)


@pytest.mark.parametrize("move", MOVES, ids=name)
def test_a_run_moves(outcomes: dict[str, str], move: Move) -> None:
    """Second moment, first moment, weights, settings, buffers; then it trains on."""
    saved, loaded = outcomes[f"save_{move[0]}_{move[1]}"], outcomes[name(move)]
    assert not saved, saved
    assert not loaded, loaded


@pytest.mark.parametrize(
    "case",
    [
        case
        for module in (cases_moving, cases_micro_moving, cases_frozen, cases_peaks)
        for case in module.CASES
    ],
)
def test_stock_tools_faults_kills_and_memory(outcomes: dict[str, str], case: str) -> None:
    """DeepSpeed's converter and loader; what is refused; what it costs."""
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("case", cases_momentum.CASES)
def test_the_kind_of_a_first_moment(outcomes: dict[str, str], case: str) -> None:
    """Setting and values agree, whoever loads; converted where the setting stays, else copied."""
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("case", cases_switch.CASES)
def test_between_adamw_and_adapprox(outcomes: dict[str, str], case: str) -> None:
    """The loss does not jump, as it does with a first moment of the wrong kind; nothing is lost."""
    assert not outcomes[case], outcomes[case]


def test_the_cover_covers() -> None:
    """Every pair of a stage and a world, on both sides."""
    assert {(s, a) for s, a, _, _ in COVER} == {(s, a) for s in GRID for a in WORLDS_SAVE}
    assert {(t, b) for _, _, t, b in COVER} == {(t, b) for t in GRID for b in WORLDS_LOAD}
