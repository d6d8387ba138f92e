# SPDX-License-Identifier: Apache-2.0
"""Every DeepSpeed config that is shipped trains on two ranks; the paper's memory table holds."""

from __future__ import annotations

import importlib.util

import pytest

from tests import ROOT
from tests.zero.cases_configs import CASES

#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.zero.cases_configs", CASES)


@pytest.mark.parametrize("config", CASES)
def test_config_trains(outcomes: dict[str, str], config: str) -> None:
    """See tests/zero/cases_configs.py."""
    assert not outcomes[config], outcomes[config]


def test_every_situation_has_a_config() -> None:
    """The situations that the README names."""
    names = {"", "_zero1", "_zero3", "_zero3_matrix", "_fp16", "_paper"}
    names |= {"_zero2_offload", "_zero3_offload", "_lean", "_lean_zero3"}
    assert {*(f"ds_adapprox{name}" for name in names), "ds_microadam"} <= set(CASES)


def test_memory_equals_the_papers_table_8() -> None:
    """State bytes of GPT-2 124M and 345M at seven ranks, to the paper's two decimals."""
    path = ROOT / "examples/paper/table8_memory.py"
    spec = importlib.util.spec_from_file_location("table8_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, row in module.table().items():
        assert [round(n / 2**20, 2) for n in row["bytes"]] == list(module.PAPER[name])
