# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's known faults and unsupported settings: survived, repaired or refused."""

from __future__ import annotations

import pytest
import torch

from adapprox_ds import Adapprox, attach
from tests.zero.cases_faults import CASES

#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (3, "tests.zero.cases_faults", CASES)


@pytest.mark.parametrize("case", CASES)
def test_fault(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_faults.py."""
    assert not outcomes[case], outcomes[case]


def test_attach_is_not_for_plain_torch() -> None:
    """Its message says that there is nothing to do."""
    optimizer = Adapprox([torch.nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(RuntimeError, match="the Adapprox itself: in plain torch there is nothing"):
        attach(optimizer)
