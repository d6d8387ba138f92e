# SPDX-License-Identifier: Apache-2.0
"""Runs a part of the tests with each supported release of DeepSpeed, and writes what passed.

``python -m tests.compat.run [RELEASE ...]`` installs each release alone into a folder
(build/deepspeed/RELEASE, beside the torch that is installed), puts that folder first on the path of
a process of its own, and keeps the outcome in build/compatibility.json, from which it writes
docs/compatibility.md. Releases that were not run again keep their last outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import ROOT

RESULTS = ROOT / "build" / "compatibility.json"
TABLE = ROOT / "docs" / "compatibility.md"
#: Beside the pinned one.
RELEASES = ("0.16.9", "0.17.6", "0.18.4", "0.18.9", "0.19.0")
#: What came later, or was DeepSpeed's own fault before: the release, what it is, and parts of the
#: names of the cases that need it.
SINCE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "0.18.4",
        "ranks of which a group's part is padding alone, at stages 1 and 2: 0.17.6 fails on them, "
        "whatever the optimizer",
        ("load_z2_1_to_z1_4",),
    ),
    (
        "0.18.4",
        "DeepSpeed's own converter at stage 3 for several groups of parameters; "
        "`python -m adapprox_ds convert` takes them",
        ("stock_convert_z3",),
    ),
    ("0.17.6", "`engine.offload_states` at stages 1 and 2", ()),
    (
        "0.17.6",
        "parameters frozen after `initialize` at stage 0 in bf16: before, BF16_Optimizer steps "
        "them in flat shards, where weight decay moves them whatever the optimizer",
        ("frozen_afterwards",),
    ),
    ("0.18.4", "16-bit master weights", ("masters", "lean")),
    (
        "0.18.9",
        "bf16 at stage 0: before, FP16_UnfusedOptimizer divides gradients by a loss scale that "
        "the loss never had, which Adam's quotient hides but for eps",
        ("z0_bf16",),
    ),
    (
        "0.19.0",
        "BF16_Optimizer (stage 1 with gradients in fp32): before, beside the torch of "
        "`constraints.txt`, it steps with gradients that no one summed over the ranks",
        ("bf16_optimizer", "save_bf16", "load_bf16", "to_bf16"),
    ),
    (
        "0.19.3",
        "DeepSpeed's own loader of universal checkpoints at stage 3: before, it takes no file "
        "that holds more than a tensor; `adapprox_ds.load_universal` does",
        ("stock_load_z3",),
    ),
    (
        "0.19.7",
        "the same loader at stages 1 and 2 with the stock `deepspeed.initialize`: before, it "
        "leaves parameters linked to a buffer in place of their shard; call "
        "`adapprox_ds.attach` before loading",
        ("stock_convert_z1",),
    ),
    ("0.19.7", "`parameter_alignment`", ("aligned",)),
    (
        "0.19.8",
        "universal checkpoints loaded at stage 0 in bf16 or fp16 where parameters are frozen: "
        "before, DeepSpeed steps copies of these too",
        ("move_z3_to_z0",),
    ),
)
#: A part of the tests -> the worlds that are started for it, in order: module, ranks, cases.
Worlds = list[tuple[str, int, list[str]]]


def parts() -> dict[str, Worlds]:
    """What is run, by the name of its column."""
    from tests.checkpoint import cases_moving
    from tests.checkpoint.cases_resume import RUNS
    from tests.checkpoint.test_universal import COVER, ON_TWO, name
    from tests.matrix_views.cases_matrix_views import CASES as VIEWS
    from tests.zero.cases_configs import CASES as CONFIGS
    from tests.zero.cases_stages import CASES as STAGES

    stages = list(STAGES)
    views = [v for v in VIEWS if "came" not in v and "galore" not in v]
    moves: Worlds = []
    for world in sorted({a for _, a, *_ in COVER}):
        kinds = dict.fromkeys(kind for kind, a, *_ in COVER if a == world)
        moves.append(
            ("tests.checkpoint.cases_universal", world, [f"save_{k}_{world}" for k in kinds])
        )
    for world in sorted({b for *_, b in COVER}):
        moves.append(
            ("tests.checkpoint.cases_universal", world, [name(m) for m in COVER if m[3] == world])
        )
    stock = [c for c in ON_TWO[cases_moving] if c.startswith("stock")]
    moves.append(("tests.checkpoint.cases_moving", 2, stock))
    return {
        "every config": [("tests.zero.cases_configs", 2, list(CONFIGS))],
        "every stage": [
            ("tests.zero.cases_stages", 1, stages[::4]),
            ("tests.zero.cases_stages", 2, stages),
        ],
        "resume": [
            ("tests.checkpoint.cases_resume", 2, [f"{half}_{r}" for r in RUNS])
            for half in ("first", "second")
        ],
        "convert, `load_universal`": moves,
        "MatrixViews": [
            (
                "tests.matrix_views.cases_matrix_views",
                2,
                [v for v in views if not v.startswith("second_")],
            ),
            (
                "tests.matrix_views.cases_matrix_views",
                2,
                [v for v in views if v.startswith("second_")],
            ),
        ],
    }


def numbers(release: str) -> tuple[int, ...]:
    """Of "0.19.8": (0, 19, 8)."""
    return tuple(int(n) for n in release.split("."))


def comes_later(case: str, release: str) -> bool:
    """Whether a case needs what DeepSpeed has only after a release."""
    later = [p for since, _, parts in SINCE if numbers(since) > numbers(release) for p in parts]
    return any(part in case for part in later)


def pinned() -> str:
    """The release that constraints.txt pins, against which all tests are run."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("deepspeed=="))


def installed(release: str) -> Path:
    """A folder that holds the release and nothing else; made where there is none."""
    folder = ROOT / "build" / "deepspeed" / release
    if not (folder / f"deepspeed-{release}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--no-build-isolation", "--target", str(folder), f"deepspeed=={release}"]
        subprocess.run(pip, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
    return folder


def run_here(release: str, part: str) -> dict[str, Any]:
    """Run a part with the DeepSpeed that this process finds: what passed, failed and cannot be."""
    # Takes ninja off PATH, with which DeepSpeed would compile an operator that no test needs.
    import deepspeed

    import tests.conftest  # noqa: F401
    from tests.world import run_world

    if deepspeed.__version__ != release:
        raise RuntimeError(f"this process found DeepSpeed {deepspeed.__version__}, not {release}")
    outcome: dict[str, str] = {}
    absent: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for module, world, cases in parts()[part]:
            new = [c for c in cases if comes_later(c, release)]
            absent += new
            ran = run_world(world, module, [c for c in cases if c not in new], Path(scratch))
            outcome |= {f"{case} on {world}": text for case, text in ran.items()}
    failed = {case: text for case, text in outcome.items() if text}
    return {"passed": len(outcome) - len(failed), "absent": absent, "failed": failed}


def run_part(release: str, part: str) -> dict[str, Any]:
    """Run a part with a release, in a process of its own."""
    folder = installed(release)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "DS_ACCELERATOR": "cpu",
    }
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "tests.compat.run", release]
        command += ["--part", part, "--report", report.name]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        outcome: dict[str, Any] = json.loads(Path(report.name).read_text())
    return outcome | {"seconds": round(time.monotonic() - start)}


def write_table(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    """The outcome as docs/compatibility.md."""
    lines = [
        "# Releases of DeepSpeed",
        "",
        "Written by `make compat`, which runs these tests with each release of DeepSpeed, beside "
        "the torch of",
        "`constraints.txt`, on CPU ranks; not by hand. A cell is the number of tests that passed, "
        "of those that ran.",
        "",
        "| DeepSpeed | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for release in sorted(results, key=numbers):
        cells = []
        for part in names:
            outcome = results[release].get(part)
            if outcome is None:
                cells.append("not run")
            else:
                ran = outcome["passed"] + sum(
                    not comes_later(c, release) for c in outcome["failed"]
                )
                cells.append(f"{outcome['passed']} of {ran}")
        lines.append(f"| {release} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Not in a cell, because DeepSpeed has it only from a release on, the first of those tried "
        "that does:",
        "",
        *(f"- {since}: {what}." for since, what, _ in SINCE),
        "",
        "Before 0.19.8 a parameter without elements stops ZeRO-1 and 2 in DeepSpeed itself, and "
        "before 0.19.0 they",
        "want a torch older than 2.13 on several ranks: their all-gather writes outside "
        "`no_grad`, which the tests",
        "put around it.",
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Run, write, and say whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=[*RELEASES, pinned()])
    parser.add_argument("--part", help="this one alone, with the DeepSpeed that is found")
    parser.add_argument("--report", type=Path, help="where that part's outcome is written")
    options = parser.parse_args()
    if options.report:
        outcome = run_here(options.releases[0], options.part)
        options.report.write_text(json.dumps(outcome))
        return 0
    names = list(parts())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    good = True
    for release in options.releases:
        known = results.setdefault(release, {})
        for part in [options.part] if options.part else names:
            known[part] = outcome = run_part(release, part)
            good = good and outcome["passed"] > 0 and not outcome["failed"]
            line = f"DeepSpeed {release}: {part}: {outcome['passed']} passed"
            print(f"{line}, {len(outcome['failed'])} failed, {outcome['seconds']} s", flush=True)
            for case, text in outcome["failed"].items():
                print(f"  {case}: {text.strip().splitlines()[-1]}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results, names)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
