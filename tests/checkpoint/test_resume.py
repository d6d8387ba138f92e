# SPDX-License-Identifier: Apache-2.0
"""Bitwise resume at the same topology, across processes, at every stage."""

from __future__ import annotations

import pytest

from tests.checkpoint.cases_resume import RUNS
from tests.world import run_worlds


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The first halves on two ranks, then, in new processes, the second halves."""
    scratch = tmp_path_factory.mktemp("resume")
    found: dict[str, str] = {}
    for half in ("first", "second"):
        cases = [f"{half}_{name}" for name in RUNS]
        parts = (cases[::2], cases[1::2])
        found |= run_worlds([(2, "tests.checkpoint.cases_resume", part) for part in parts], scratch)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_ten_steps_equal_five_and_five(outcomes: dict[str, str], run: str) -> None:
    """Weights, first moments, factors, rank moments and errors are equal to the bit."""
    assert not outcomes[f"first_{run}"], outcomes[f"first_{run}"]
    assert not outcomes[f"second_{run}"], outcomes[f"second_{run}"]
