# SPDX-License-Identifier: Apache-2.0
"""Writes the README's table of what works at which ZeRO stage, from the outcome of the tests.

``make test`` leaves its outcome in build/tests.xml; ``python -m tests.support`` then says yes in a
cell where every test that the cell names was run and passed, and refuses to write the table where
one failed or was not run.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests import ROOT

OUTCOME = ROOT / "build" / "tests.xml"
START, END = "<!-- support -->", "<!-- end -->"
STAGES = ("0, plain", "1", "2", "3")
#: What works -> by stage the tests that show it, file:case; blank where there is no such thing.
ROWS: dict[str, tuple[str, str, str, str]] = {
    "fp32": ("stages:z0_fp32", "stages:z1_fp32", "stages:z2_fp32", "stages:z3_fp32"),
    "bf16": (
        "stages:z0_bf16",
        "stages:z1_bf16_registered stages:bf16_optimizer",
        "stages:z2_bf16_callable",
        "stages:z3_bf16_instance",
    ),
    "fp16, with steps that overflow": (
        "stages:z0_fp16",
        "features:z1_fp16",
        "stages:z2_fp16_overflow",
        "stages:z3_fp16_overflow",
    ),
    "16-bit master weights": (
        "resume:z0_masters",
        "features:masters_below_their_parameters",
        "configs:ds_adapprox_lean",
        "resume:z3_masters configs:ds_adapprox_lean_zero3",
    ),
    "`torch_autocast`": ("", "", "features:z2_autocast", "features:z3_autocast"),
    "optimizer on the CPU (`offload_optimizer`)": (
        "",
        "features:z1_offload",
        "stages:z2_offload",
        "stages:z3_offload",
    ),
    "parameters on the CPU (`offload_param`)": ("", "", "", "features:z3_offload_param"),
    "`zero.Init`, sub-groups": ("", "", "", "stages:z3_init stages:z3_sub_groups_clip"),
    "`round_robin_gradients`, `parameter_alignment`": (
        "",
        "stages:z1_round_robin",
        "stages:z2_round_robin_callable stages:z2_aligned",
        "",
    ),
    "clipping and accumulation of gradients": (
        "",
        "features:z1_unmanaged",
        "stages:z2_accumulate_clip",
        "stages:z3_registered_accumulate stages:z3_clipped",
    ),
    "resume, to the bit": (
        "resume:z0_fp32",
        "resume:z1_instance resume:bf16_optimizer",
        "resume:z2_fp16",
        "resume:z3",
    ),
    "goes on at another stage and number of ranks": (
        "universal:load_z3_kept_2_to_z0_1",
        "universal:load_z3_3_to_z1_2",
        "universal:load_z1_3_to_z2_2",
        "universal:load_z2_2_to_z3_1",
    ),
    '`scope="matrix"`': ("", "scope:z1", "scope:z2_clipped", "scope:z3"),
    "`MicroAdam`": (
        "stages:micro_z0_fp32",
        "stages:micro_z1_bf16_registered",
        "stages:micro_z2_bf16_callable",
        "stages:micro_z3_fp32",
    ),
    "`MatrixViews`": (
        "matrix_views:equals_z0_bf16_adafactor",
        "matrix_views:equals_z1_adafactor",
        "matrix_views:equals_z2_offload_muon",
        "matrix_views:equals_z3_adafactor",
    ),
    '`MatrixViews(scope="matrix")`': (
        "matrix_views:equals_whole_z0_bf16_muon",
        "matrix_views:equals_whole_bf16_optimizer_adafactor",
        "matrix_views:equals_whole_z2_offload_muon",
        "matrix_views:equals_whole_z3_init_muon",
    ),
    "mixtures of experts": ("", "features:experts", "features:experts", ""),
    "pipelines with tied layers": ("features:tied_pipeline", "features:tied_pipeline", "", ""),
    "AutoTP": ("", "features:tensor_parallel", "", ""),
    "Ulysses": ("", "", "features:sequence_parallel", "features:sequence_parallel"),
    "ZeRO++ hpZ": ("", "", "", "features:z3_hpz"),
}


def outcomes(report: Path) -> dict[tuple[str, str], bool]:
    """By file and case of a pytest report: whether every test of it passed."""
    found: dict[tuple[str, str], bool] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        file = str(test.get("classname")).removeprefix("tests.test_")
        # "test_equals_oracle[2-z1_fp32]" is case z1_fp32 on two ranks.
        match = re.search(r"\[(?:\d+-)?(.+)\]$", str(test.get("name")))
        if match:
            key = (file, match[1])
            passed = all(test.find(kind) is None for kind in ("failure", "error", "skipped"))
            found[key] = found.get(key, True) and passed
    return found


def named(cell: str) -> list[tuple[str, str]]:
    """The file and the case of each test in a cell."""
    return [(file, case) for file, _, case in (part.partition(":") for part in cell.split())]


def table() -> str:
    """The table where all tests passed."""
    lines = ["| works at ZeRO stage | " + " | ".join(STAGES) + " |", "|---" * 5 + "|"]
    lines += [
        f"| {what} | " + " | ".join("yes" if cell else "" for cell in cells) + " |"
        for what, cells in ROWS.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", nargs="?", type=Path, default=OUTCOME)
    found = outcomes(parser.parse_args().report)
    wanted = {test for cells in ROWS.values() for cell in cells for test in named(cell)}
    if bad := sorted(":".join(test) for test in wanted if not found.get(test)):
        sys.exit(f"these failed or were not run, so the table is not written: {', '.join(bad)}")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
