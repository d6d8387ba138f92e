# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed, and what its own tests and users expect of any optimizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cases_features import CASES
from tests.world import run_world


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every case on two ranks."""
    scratch = tmp_path_factory.mktemp("features")
    return run_world(2, "tests.cases_features", list(CASES), scratch)


@pytest.mark.parametrize("case", CASES)
def test_under_deepspeed(outcomes: dict[str, str], case: str) -> None:
    """See tests/cases_features.py and tests/cases_expectations.py."""
    assert not outcomes[case], outcomes[case]


def test_limits_name_every_case() -> None:
    """Each feature has a row in docs/limits.md, with its tests, which exist."""
    page = (Path(__file__).resolve().parent.parent / "docs/limits.md").read_text()
    _, table = page.split("| feature | | tests")
    rows = table.split("\n\n")[0].splitlines()[2:]
    named = [re.findall(r"`([\w.]+)`", row.rsplit(" | ", 1)[1]) for row in rows]
    assert sorted(name for names in named for name in names if name != "test_faults.py") == sorted(
        CASES
    )
    assert all(names or "not tried" in row for names, row in zip(named, rows, strict=True))
