# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/moving-a-run.md, in the order of the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.project.pages import blocks, printed, shell

PAGE = "docs/moving-a-run.md"

SCRIPT, WEIGHTS = blocks(PAGE, "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moving")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What the page's commands print."""
    (folder / "move.py").write_text(SCRIPT)
    return shell("".join(blocks(PAGE, "bash")), folder)


def test_the_run_goes_on(output: str) -> None:
    """Losses fall on after each move; a fresh start would be far above."""
    steps = [
        (int(step), float(loss)) for step, loss in re.findall(r"step (\d+) loss ([\d.]+)", output)
    ]
    assert {step for step, _ in steps[:2]} == {20}
    assert {step for step, _ in steps[2:]} == {30}
    assert max(loss for _, loss in steps[2:]) < min(loss for _, loss in steps[:2])


def test_inspect_says_what_there_is(output: str) -> None:
    """The native checkpoint and the universal one."""
    assert (
        len(re.findall("of stage 2 on 2 processes; Adapprox, first moment of gradients", output))
        == 2
    )
    assert len(re.findall(r"0\.weight +256x64 +\d+(?:-\d+ x2)? ", output)) == 2


def test_weights_are_read_without_the_package(output: str, folder: Path) -> None:
    """By the page's script, where DeepSpeed's fails."""
    (folder / "weights.py").write_text(WEIGHTS)
    absent = folder / "absent" / "adapprox_ds"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('adapprox_ds')\n")
    without = {"PYTHONPATH": str(absent.parent)}
    stock = [sys.executable, "checkpoints/zero_to_fp32.py", "checkpoints", "stock"]
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        printed(stock, folder, **without)
    printed([sys.executable, "weights.py", "checkpoints", "weights"], folder, **without)
    saved, found = (
        torch.load(folder / file, weights_only=True)
        for file in (
            "checkpoints/global_step20_universal/zero/0.weight/fp32.pt",
            "weights/pytorch_model.bin",
        )
    )
    assert torch.equal(saved["param"], found["0.weight"])
