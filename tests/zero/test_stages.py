# SPDX-License-Identifier: Apache-2.0
"""Training under every wrapper equals Algorithm 3 on the same row blocks, on 1, 2 and 3 ranks.

``ADAPPROX_GRID=full`` takes every case on every number of ranks.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.world import run_world

pytest.importorskip("deepspeed")
from tests.zero.cases_stages import CASES

NAMES = list(CASES)
#: Every case on two ranks or three, which cut otherwise, and a part on one, which cuts nothing.
WORLDS = {1: NAMES[::3], 2: NAMES[1::2], 3: NAMES[::2]}
if os.environ.get("ADAPPROX_GRID") == "full":
    WORLDS = dict.fromkeys(WORLDS, NAMES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """By world and case, each world started once."""

    def run(world: int) -> dict[str, str]:
        scratch = tmp_path_factory.mktemp(f"world{world}")
        return run_world(world, "tests.zero.cases_stages", WORLDS[world], scratch)

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(WORLDS, pool.map(run, WORLDS), strict=True))
    return {(world, case): text for world, texts in found.items() for case, text in texts.items()}


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in WORLDS.items() for case in cases]
)
def test_equals_oracle(outcomes: dict[tuple[int, str], str], world: int, case: str) -> None:
    """See tests/zero/cases_stages.py."""
    assert not outcomes[world, case], outcomes[world, case]
