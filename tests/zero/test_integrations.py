# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/integrations, on CPU ranks, as far as their tools are installed."""

from __future__ import annotations

import copy
import re
import runpy
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox
from tests import ROOT
from tests.world import run_world

pytest.importorskip("accelerate")
pytest.importorskip("peft")

#: Tool, as it is called at a package registry -> its cases in cases_integrations.py.
CASES = {
    "trl": ["sft_zero3", "sft_lora", "dpo_zero2", "dpo_zero3", "grpo_zero2"],
    "transformers": ["named"],
    "axolotl": ["axolotl"],
    "llamafactory": ["llamafactory"],
    "ms-swift": ["swift"],
}


def installed(tool: str) -> bool:
    """Whether pip installed it; what it is imported as may be another package's name."""
    try:
        version(tool)
    except PackageNotFoundError:
        return False
    return True


#: Those that run on one rank.
ALONE = {"axolotl"}
TOOL_OF = {case: tool for tool, cases in CASES.items() for case in cases}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All cases whose tool is there."""
    folder = tmp_path_factory.mktemp("integrations")
    cases = [case for case, tool in TOOL_OF.items() if installed(tool)]
    several = [case for case in cases if case not in ALONE]
    found = run_world(2, "tests.zero.cases_integrations", several, folder)
    return found | run_world(1, "tests.zero.cases_integrations", [*ALONE & {*cases}], folder)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.skipif(not installed(tool), reason=f"needs {tool}"))
        for case, tool in TOOL_OF.items()
    ],
)
def test_trains_saves_and_resumes(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_integrations.py."""
    assert not outcomes[case], outcomes[case]


def made_by(tool: str, model: torch.nn.Module) -> Adapprox:
    """Adapprox by its name in a tool's registry."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, "rank_max": 4}
    script = runpy.run_path(str(ROOT / "examples/integrations/registries.py"))
    script[f"register_{tool}"]()
    if tool == "timm":
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(model, opt="adapprox", **settings)
    from pytorch_optimizer import create_optimizer

    return create_optimizer(model, "adapprox", **settings)


@pytest.mark.parametrize("tool", ["timm", "pytorch_optimizer"])
def test_registries(tool: str) -> None:
    """By its name Adapprox is made, with the tool's groups; it saves and resumes."""
    pytest.importorskip(tool)

    def run(steps: range, before: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        optimizer = made_by(tool, model)
        assert type(optimizer) is Adapprox
        assert {
            (p.ndim > 1, group["weight_decay"], group["rank_max"])
            for group in optimizer.param_groups
            for p in group["params"]
        } == {(True, 0.1, 4), (False, 0.0, 4)}
        if before is not None:
            model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    whole = run(range(4))[0]
    half = run(range(2))
    assert not torch.equal(half[0]["0.weight"], whole["0.weight"])
    resumed = run(range(2, 4), half)[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_pages_registries() -> None:
    """Each paragraph of README.md's code runs where its tool is installed."""
    page = (ROOT / "examples/integrations/README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    first, *paragraphs = re.split(r"\n\n(?=#)", block)
    assert len(paragraphs) == 3
    for paragraph in paragraphs:
        code = compile(f"{first}\n{paragraph}", "README.md", "exec")
        if find_spec(re.findall(r"^from (\w+)", paragraph, re.MULTILINE)[0]):
            exec(code, {})
