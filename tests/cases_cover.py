# SPDX-License-Identifier: Apache-2.0
"""Every pair of settings, stages, worlds and precisions that go together. Run by test_cover.py.

A row of the cover trains, equals the naive oracle, resumes to the bit, and then moves to the other
world and another stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from allpairspy import AllPairs
from torch import Tensor

from adapprox_ds.checkpoint import convert, load_universal
from adapprox_ds.optim.presets import resolve
from tests.cases_resume import differences, snapshot
from tests.cases_stages import Z2, Z3, Case, advance, check, full_value, oracles, start, train
from tests.methods import DEFAULT, METHODS
from tests.models import trainable
from tests.oracle import Settings

HALF = 4
#: From every stage to another; stage 0, which does not convert, is moved to from stage 1.
STAGES: dict[int, tuple[dict[str, Any] | None, int]] = {
    0: (None, 0),
    1: ({"stage": 1}, 3),
    2: (Z2, 1),
    3: (Z3, 2),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "scope": ("matrix", "partition"),
    "right_factor": ("sharded", "replicated"),
    "factor_dtype": ("fp32", "bf16"),
    "first_moment": ("fp32", "bf16", "int8", "none"),
    "rank_policy": ("reflect", "expand"),
    "preset": ("default", "paper"),
    "stage": tuple(STAGES),
    "world": (2, 1),
    "precision": ("fp32", "bf16"),
}


def allowed(row: Iterable[Any]) -> bool:
    """Whether the first settings of a row may stand together."""
    given = dict(zip(FACTORS, row, strict=False))
    preset = given.pop("preset", "default")
    for other in ("stage", "world", "precision"):
        given.pop(other, None)
    given["betas"] = (0.0 if given.get("first_moment") == "none" else 0.9, 0.999)
    try:
        resolve(None if preset == "default" else preset, given)
    except ValueError:
        return False
    return True


ROWS: dict[str, dict[str, Any]] = {
    "_".join(map(str, row)): dict(zip(FACTORS, row, strict=True))
    for row in AllPairs(list(FACTORS.values()), filter_func=allowed)
}


def missing() -> set[Any]:
    """Pairs that may stand together, and that no row has."""

    def pairs(rows: Iterable[Any]) -> set[Any]:
        places = [(i, j) for i in range(len(FACTORS)) for j in range(i)]
        return {(i, j, row[i], row[j]) for row in rows for i, j in places}

    every = pairs(filter(allowed, product(*FACTORS.values())))
    return every - pairs(tuple(row.values()) for row in ROWS.values())


def case_of(name: str) -> Case:
    """A row as a run, whose oracle's settings are recorded as a method of its name."""
    row = ROWS[name]
    grown = row["rank_policy"] == "expand"
    settings = replace(
        DEFAULT if row["preset"] == "default" else Settings(),
        beta1=0.0 if row["first_moment"] == "none" else 0.9,
        policy=row["rank_policy"],
        k0=1 if grown else 2,
        kmax=4,
        xi=0.05,
        interval=4,
    )
    kept = ("scope", "right_factor", "factor_dtype", "first_moment")
    METHODS[name] = ({**settings.knobs(), **{key: row[key] for key in kept}}, settings)
    return Case(STAGES[row["stage"]][0], row["precision"], method=name)


def weights(engine: Any, model: Any) -> dict[str, Tensor]:
    """Whole fp32 master weights."""
    return {n: full_value(engine, p, None).clone() for n, p in trainable(model).items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of two models' weights."""
    return math.sqrt(sum(float((a[n] - w).double().square().sum()) for n, w in b.items()))


def exact(row: dict[str, Any]) -> bool:
    """Whether nothing of the state is rounded."""
    return row["factor_dtype"] == "fp32" and row["first_moment"] in ("fp32", "none")


def trained(name: str, folder: Path) -> None:
    """Eight steps beside the oracle; a checkpoint of the fourth, from which four more are equal."""
    row, case, world = ROWS[name], case_of(name), torch.distributed.get_world_size()
    engine, model = start(case)
    naive, first = oracles(case, world), weights(engine, model)
    for step in range(2 * HALF):
        train(engine, case, step)
        advance(case, naive, step)
        if exact(row):
            check(case, engine, model, naive)
        if step + 1 == HALF:
            engine.save_checkpoint(str(folder))
            saved = weights(engine, model)
    reference, last = snapshot(engine), weights(engine, model)
    ranks = {block[2] for flat in reference["flats"] for block in flat["blocks"]}
    assert ranks - {METHODS[name][1].k0}, "no rank moved"
    expected = {n: torch.cat([part.w for part in naive[n]]).view(w.shape) for n, w in last.items()}
    off = distance(last, expected) / distance(first, expected)
    print("COVER", name, "oracle", off, flush=True)
    assert off < 0.05, f"{off} from the oracle"
    engine.destroy()
    engine, model = start(case)
    for p in model.parameters():
        p.data.zero_()
    engine.load_checkpoint(str(folder))
    for step in range(HALF, 2 * HALF):
        train(engine, case, step)
    unequal = differences(reference, snapshot(engine))
    assert not unequal, unequal
    engine.destroy()
    if case.stage == 0:
        case = replace(case, zero=STAGES[1][0])
        engine, model = start(case)
        for step in range(HALF):
            train(engine, case, step)
        saved = weights(engine, model)
        engine.save_checkpoint(str(folder))
        engine.destroy()
    if torch.distributed.get_rank() == 0:
        tag = (folder / "latest").read_text()
        convert(folder, folder / f"{tag}_universal", workers=1)
        torch.save({"saved": saved, "last": last}, folder / "weights.pt")
    torch.distributed.barrier()


def moved(name: str, folder: Path) -> None:
    """The same run goes on in another world and at another stage."""
    row, case, source = ROWS[name], case_of(name), folder.parent / f"trained_{name}"
    record = torch.load(source / "weights.pt")
    engine, model = start(replace(case, zero=STAGES[STAGES[case.stage][1]][0]))
    load_universal(engine, source)
    assert distance(weights(engine, model), record["saved"]) == 0.0
    for step in range(HALF, 2 * HALF):
        train(engine, case, step)
    found = weights(engine, model)
    off = distance(found, record["last"]) / distance(record["saved"], record["last"])
    print("COVER", name, "moved", off, flush=True)
    bound = 1e-4 if exact(row) and row["scope"] == "matrix" else 0.25
    assert off < bound, f"{off} from the run that went on"
    engine.destroy()


def of_world(world: int, what: str) -> list[str]:
    """Cases of the rows that train on so many ranks."""
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
