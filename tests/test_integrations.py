# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/integrations, on two ranks, as far as their tools are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.world import run_world

pytest.importorskip("accelerate")
pytest.importorskip("peft")

#: Tool, as it is called at a package registry -> its cases in cases_integrations.py.
CASES = {
    "trl": ["sft_zero3", "sft_lora", "dpo_zero2", "dpo_zero3", "grpo_zero2"],
    "axolotl": ["axolotl"],
    "ms-swift": ["swift"],
    "llamafactory": ["llamafactory"],
}


def installed(tool: str) -> bool:
    """Whether pip installed it; what it is imported as may be another package's name."""
    try:
        version(tool)
    except PackageNotFoundError:
        return False
    return True


TOOL_OF = {case: tool for tool, cases in CASES.items() for case in cases}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All cases whose tool is there."""
    cases = [case for case, tool in TOOL_OF.items() if installed(tool)]
    return run_world(2, "tests.cases_integrations", cases, tmp_path_factory.mktemp("integrations"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.skipif(not installed(tool), reason=f"needs {tool}"))
        for case, tool in TOOL_OF.items()
    ],
)
def test_case(outcomes: dict[str, str], case: str) -> None:
    """See tests/cases_integrations.py."""
    assert not outcomes[case], outcomes[case]
