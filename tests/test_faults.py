# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's known faults and unsupported settings: survived, repaired or refused."""

from __future__ import annotations

import pytest

from tests.cases_faults import CASES
from tests.world import run_world


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every case on three ranks."""
    return run_world(3, "tests.cases_faults", list(CASES), tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("case", CASES)
def test_fault(outcomes: dict[str, str], case: str) -> None:
    """See tests/cases_faults.py."""
    assert not outcomes[case], outcomes[case]
