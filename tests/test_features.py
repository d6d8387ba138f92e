# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed, and what its own tests and users expect of any optimizer."""

from __future__ import annotations

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
