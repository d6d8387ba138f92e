# SPDX-License-Identifier: Apache-2.0
"""Ranks that were not started alike: one clear error on all of them, and no hang."""

from __future__ import annotations

import pytest
import torch

from adapprox_ds import Adapprox
from adapprox_ds.zero.handshake import facts_of_shards
from tests.faults.cases_handshake import CASES

#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.faults.cases_handshake", CASES)


@pytest.mark.parametrize("case", CASES)
def test_handshake(outcomes: dict[str, str], case: str) -> None:
    """See cases_handshake.py."""
    assert not outcomes[case], outcomes[case]


def test_experts_may_have_other_names() -> None:
    """DeepSpeed marks the parameters of expert-parallel ranks."""
    facts = []
    for expert in range(2):
        p = torch.nn.Parameter(torch.zeros(4 + expert, 4))
        p.allreduce = False  # type: ignore[attr-defined]
        facts.append(facts_of_shards(Adapprox([(f"experts.{expert}", p)]).shards))
    assert facts[0] == facts[1]
