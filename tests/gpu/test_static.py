# SPDX-License-Identifier: Apache-2.0
"""The kernels' README says what ptxas reports, and main kernels spill no registers."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
from tests.gpu import static

TABLE = static.README.read_text().partition(static.BEGIN)[2].partition(static.END)[0]


def cells(form: static.Form | static.Small) -> list[str]:
    """Of a form's row, by capability."""
    (row,) = re.findall(rf"^\| {re.escape(form.words)} \|(.*)\|$", TABLE, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize(
    ("number", "capability"), [(0, 80), (1, 90), (2, 100)], ids=["fp32", "bf16", "codes"]
)
def test_the_table_is_of_these_kernels(number: int, capability: int) -> None:
    """One of each first moment and each device; ``make gpu-static`` writes them all."""
    if static.header() not in TABLE:
        pytest.skip("the table is of another release of Triton")
    form = static.MAIN[number]
    written = cells(form)[list(static.SHARED).index(capability)]
    assert written == str(static.main_kernel(form, capability)), "run make gpu-static"


def test_main_kernels_keep_all_in_registers() -> None:
    main = (*static.MAIN, *static.SMALL)
    spilled = {form.words: [cell.split(", ")[1] for cell in cells(form)] for form in main}
    assert all(each == ["0"] * 3 for each in spilled.values()), spilled


def test_occupancy() -> None:
    """By registers, by shared memory, by warps and by programs."""
    of = {"spilled": 0, "ptx": ""}
    assert static.Built(80, registers=255, shared=12 << 10, warps=4, **of).resident == 8
    assert static.Built(80, registers=40, shared=64 << 10, warps=4, **of).resident == 8
    assert static.Built(90, registers=40, shared=64 << 10, warps=4, **of).resident == 12
    assert static.Built(90, registers=32, shared=0, warps=4, **of).resident == 64
    assert static.Built(90, registers=32, shared=0, warps=1, **of).resident == 32
