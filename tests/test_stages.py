# SPDX-License-Identifier: Apache-2.0
"""Training under every wrapper equals Algorithm 3 on the same row blocks, on 1, 2 and 3 ranks."""

from __future__ import annotations

import pytest

from tests.world import run_world

pytest.importorskip("deepspeed")
from tests.cases_stages import CASES

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Every case on every world, each world started once."""
    return {
        world: run_world(
            world, "tests.cases_stages", list(CASES), tmp_path_factory.mktemp(f"world{world}")
        )
        for world in WORLDS
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_equals_oracle(outcomes: dict[int, dict[str, str]], world: int, case: str) -> None:
    """See tests/cases_stages.py."""
    assert not outcomes[world][case], outcomes[world][case]
