# SPDX-License-Identifier: Apache-2.0
"""Training under every wrapper equals Algorithm 3 on the same row blocks, on 1, 2 and 3 ranks."""

from __future__ import annotations

import pytest

from tests.world import run_world

pytest.importorskip("deepspeed")
from tests.cases_stages import CASES

#: Three ranks cut most; of one and two, which cut nothing and less, every case has either.
WORLDS = {1: list(CASES)[::2], 2: list(CASES)[1::2], 3: list(CASES)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Every case on every world, each world started once."""
    return {
        world: run_world(
            world, "tests.cases_stages", cases, tmp_path_factory.mktemp(f"world{world}")
        )
        for world, cases in WORLDS.items()
    }


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in WORLDS.items() for case in cases]
)
def test_equals_oracle(outcomes: dict[int, dict[str, str]], world: int, case: str) -> None:
    """See tests/cases_stages.py."""
    assert not outcomes[world][case], outcomes[world][case]
