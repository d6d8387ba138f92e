# SPDX-License-Identifier: Apache-2.0
"""scope="matrix" under DeepSpeed: the number of ranks does not matter."""

from __future__ import annotations

import pytest

from tests.world import run_worlds

pytest.importorskip("deepspeed")
from tests.zero.cases_scope import WORLDS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every case, each world started once."""
    worlds = [(world, "tests.zero.cases_scope", list(cases)) for world, cases in WORLDS.items()]
    return run_worlds(worlds, tmp_path_factory.mktemp("scope"))


@pytest.mark.parametrize("case", [case for cases in WORLDS.values() for case in cases])
def test_case(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_scope.py."""
    assert not outcomes[case], outcomes[case]
