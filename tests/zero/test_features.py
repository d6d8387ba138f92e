# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed, and what its own tests and users expect of any optimizer."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from tests import ROOT, support
from tests.checkpoint.cases_resume import RUNS
from tests.checkpoint.test_universal import MOVES, name
from tests.zero.cases_features import CASES

#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.zero.cases_features", CASES)


@pytest.mark.parametrize("case", CASES)
def test_under_deepspeed(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_features.py and tests/zero/cases_expectations.py."""
    assert not outcomes[case], outcomes[case]


def test_the_table_of_what_works() -> None:
    """The README has it as it is generated, and the tests that it stands on exist."""
    assert support.table() in (support.ROOT / "README.md").read_text()
    for file, case in (
        t for cells in support.ROWS.values() for c in cells for t in support.named(c)
    ):
        if file == "resume":
            assert case in RUNS, case
        elif file == "universal":
            assert case in [name(move) for move in MOVES], case
        else:
            (path,) = (ROOT / "tests").glob(f"*/cases_{file}.py")
            module = import_module(f"tests.{path.parent.name}.{path.stem}")
            assert case in module.CASES, case


def test_limits_name_every_case() -> None:
    """Each feature has a row in docs/limits.md, with its tests, which exist."""
    page = (ROOT / "docs/limits.md").read_text()
    _, table = page.split("| feature | | tests")
    rows = table.split("\n\n")[0].splitlines()[2:]
    named = [re.findall(r"`([\w.]+)`", row.rsplit(" | ", 1)[1]) for row in rows]
    assert sorted(name for names in named for name in names if name != "test_faults.py") == sorted(
        CASES
    )
    assert all(names or "not tried" in row for names, row in zip(named, rows, strict=True))
