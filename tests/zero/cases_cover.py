# SPDX-License-Identifier: Apache-2.0
"""Every pair of settings, stages, worlds and precisions that go together. Run by test_cover.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from allpairspy import AllPairs
from torch import Tensor

from adapprox_ds.adapprox.presets import resolve
from adapprox_ds.checkpoint import convert, load_universal
from tests.adapprox.oracle import Settings
from tests.checkpoint.cases_resume import differences, snapshot
from tests.methods import DEFAULT, METHODS
from tests.models import KnownGradients, trainable
from tests.zero.cases_stages import Z2, Z3, Case, advance, check, full_value, oracles, start, train

HALF = 4
ZERO: dict[int, dict[str, Any] | None] = {0: None, 1: {"stage": 1}, 2: Z2, 3: Z3}
#: Where a row moves from its stage. To stage 0, which does not convert, one moves from stage 1.
TARGET = {0: 0, 1: 3, 2: 1, 3: 2}
VALUES: dict[str, tuple[Any, ...]] = {
    "scope": ("matrix", "partition"),
    "right_factor": ("sharded", "replicated"),
    "factor_dtype": ("fp32", "bf16"),
    "first_moment": ("fp32", "bf16", "int8", "int4", "none"),
    "preset": (None, "paper"),
    "rank_policy": ("reflect", "expand"),
    "stage": tuple(ZERO),
    "world": (2, 1),
    "masters": ("fp32", "fp32 of bf16", "bf16 at random", "bf16 compensated"),
}
#: What of them the model and the optimizer are to be told: precision and rounding.
MASTERS = {
    "fp32": ("fp32", "stochastic"),
    "fp32 of bf16": ("bf16", "stochastic"),
    "bf16 at random": ("bf16_masters", "stochastic"),
    "bf16 compensated": ("bf16_masters", "compensated"),
}
SETTINGS = ("scope", "right_factor", "factor_dtype", "first_moment", "rank_policy")


def allowed(values: Iterable[Any]) -> bool:
    """Whether the first values of a row may stand together."""
    row = dict(zip(VALUES, values, strict=False))
    given = {name: row.get(name) for name in SETTINGS}
    beta = 0.0 if row.get("first_moment") == "none" else 0.9
    try:
        resolve(row.get("preset"), {**given, "betas": (beta, 0.999)})
    except ValueError:
        return False
    return True


def pairs(row: Iterable[Any]) -> set[Any]:
    return set(combinations(zip(VALUES, row, strict=True), 2))


def missing(rows: Iterable[Iterable[Any]]) -> dict[Any, tuple[Any, ...]]:
    """Pairs that may stand together, and that no row has; with a row that has it."""
    every = filter(allowed, product(*VALUES.values()))
    found = {pair: row for row in every for pair in pairs(row)}
    for row in rows:
        for pair in pairs(row):
            found.pop(pair, None)
    return found


def cover() -> list[tuple[Any, ...]]:
    """Rows that have every pair: the library leaves some out where not all may stand together."""
    rows = [tuple(row) for row in AllPairs(list(VALUES.values()), filter_func=allowed)]
    while left := missing(rows):
        rows.append(next(iter(left.values())))
    return rows


ROWS: dict[str, dict[str, Any]] = {
    "_".join(map(str, row)).replace(" ", "-"): dict(zip(VALUES, row, strict=True))
    for row in cover()
}


def case_of(name: str) -> Case:
    """A row as a run; the oracle's settings are a method of its name."""
    row = ROWS[name]
    settings = replace(
        Settings() if row["preset"] else DEFAULT,
        beta1=0.0 if row["first_moment"] == "none" else 0.9,
        policy=row["rank_policy"],
        k0=1 if row["rank_policy"] == "expand" else 2,
        kmax=3,
        xi=0.05,
        interval=4,
    )
    precision, rounding = MASTERS[row["masters"]]
    given = {**{key: row[key] for key in SETTINGS}, "weight_rounding": rounding}
    METHODS[name] = ({**settings.knobs(), **given}, settings)
    return Case(ZERO[row["stage"]], precision, method=name)


def whole(engine: Any, model: KnownGradients, key: str | None = None) -> dict[str, Tensor]:
    return {n: full_value(engine, p, key).clone() for n, p in trainable(model).items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((a[n] - w).double().square().sum()) for n, w in b.items()))


def save(name: str, engine: Any, model: KnownGradients, folder: Path) -> dict[str, Any]:
    engine.save_checkpoint(str(folder))
    equal = ROWS[name]["first_moment"] in ("fp32", "bf16")  # groups of codes are of the partition
    keys = {"weights": None, **({"exp_avg": "exp_avg"} if equal else {})}
    return {name: whole(engine, model, key) for name, key in keys.items()}


def exact(name: str) -> bool:
    row = ROWS[name]
    rounded = row["factor_dtype"] != "fp32" or row["masters"].startswith("bf16")
    return not rounded and row["first_moment"] in ("fp32", "none")


def bound(row: dict[str, Any]) -> float:
    """How far a run may be from the oracle's, which rounds nothing, as a part of its way."""
    off = 0.02 + (0.1 if row["first_moment"] == "int4" else 0.0)
    off += {"bf16 at random": 0.25, "bf16 compensated": 0.05}.get(row["masters"], 0.0)
    return off * (2.0 if row["preset"] else 1.0)  # it goes half as far


def trained(name: str, folder: Path) -> None:
    """Eight steps beside the oracle; the last four once more from a checkpoint, to the bit."""
    case = case_of(name)
    engine, model = start(case)
    naive, first = oracles(case, torch.distributed.get_world_size()), whole(engine, model)
    for step in range(2 * HALF):
        if step == HALF:
            record = save(name, engine, model, folder)
        train(engine, case, step)
        advance(case, naive, step)
        if exact(name):
            check(case, engine, model, naive)
    record["last"] = last = whole(engine, model)
    stepped = {n: parts for n, parts in naive.items() if parts[0].t}
    expected = {n: torch.cat([part.w for part in p]).view_as(last[n]) for n, p in stepped.items()}
    assert distance(last, expected) < bound(ROWS[name]) * distance(first, expected)
    unbroken = snapshot(engine)
    engine.destroy()
    engine, model = start(case)
    engine.load_checkpoint(str(folder))
    for step in range(HALF, 2 * HALF):
        train(engine, case, step)
    assert not differences(unbroken, snapshot(engine))
    engine.destroy()
    if case.stage == 0:
        engine, model = start(replace(case, zero=ZERO[1]))
        for step in range(HALF):
            train(engine, case, step)
        record |= save(name, engine, model, folder)
        engine.destroy()
    if torch.distributed.get_rank() == 0:
        convert(folder, folder / f"{(folder / 'latest').read_text()}_universal", workers=1)
        torch.save(record, folder / "record.pt")
    torch.distributed.barrier()


def moved(name: str, folder: Path) -> None:
    """The run goes on in the other world and at another stage."""
    case, source = case_of(name), folder.parent / f"trained_{name}"
    record = torch.load(source / "record.pt")
    engine, model = start(replace(case, zero=ZERO[TARGET[case.stage]]))
    load_universal(engine, source)
    assert distance(whole(engine, model), record["weights"]) == 0.0
    if "exp_avg" in record:
        # DeepSpeed shows a state in the dtype of the weights at some stages.
        kind = torch.float32 if ROWS[name]["masters"].startswith("fp32") else torch.bfloat16
        shown = whole(engine, model, "exp_avg"), record["exp_avg"]
        assert distance(*({n: x.to(kind) for n, x in of.items()} for of in shown)) == 0.0
    for step in range(HALF, 2 * HALF):
        train(engine, case, step)
    off = distance(whole(engine, model), record["last"])
    # Blocks of another partition have other factors, and groups of codes; whole matrices the same.
    row = ROWS[name]
    same = row["scope"] == "matrix" and row["first_moment"] not in ("int8", "int4")
    assert off < (1e-4 if same else 0.25) * distance(record["weights"], record["last"])
    engine.destroy()


def of_world(world: int, what: str) -> list[str]:
    return [f"{what}_{name}" for name, row in ROWS.items() if row["world"] == world]


#: Ranks and their cases, in order: what is moved comes after what it is moved from.
RUNS = (
    (1, of_world(1, "trained")),
    (2, [*of_world(2, "trained"), *of_world(1, "moved")]),
    (1, of_world(2, "moved")),
)
CASES: dict[str, Callable[[Path], None]] = {
    f"{what.__name__}_{name}": partial(what, name) for name in ROWS for what in (trained, moved)
}
