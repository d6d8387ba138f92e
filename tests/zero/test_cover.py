# SPDX-License-Identifier: Apache-2.0
"""A pairwise cover of settings, stages and worlds: rows equal the oracle, resume and move."""

from __future__ import annotations

import pytest

from tests.world import run_world
from tests.zero.cases_cover import ROWS, RUNS, missing


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    scratch, found = tmp_path_factory.mktemp("cover"), {}
    for world, cases in RUNS:
        found |= run_world(world, "tests.zero.cases_cover", cases, scratch)
    return found


@pytest.mark.parametrize("row", ROWS)
def test_row(outcomes: dict[str, str], row: str) -> None:
    assert not outcomes[f"trained_{row}"], outcomes[f"trained_{row}"]
    assert not outcomes[f"moved_{row}"], outcomes[f"moved_{row}"]


def test_every_pair_is_in_a_row() -> None:
    assert not missing(row.values() for row in ROWS.values())
