# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/moving-a-run.md, in the order of the page."""

from __future__ import annotations

import re

import pytest

from tests.pages import blocks, printed

PAGE = "docs/moving-a-run.md"

#: Where the package cannot be imported.
WITHOUT_US = """
export PYTHONPATH=$PWD/absent
! python checkpoints/zero_to_fp32.py checkpoints stock > stock.log 2>&1
grep -q ModuleNotFoundError stock.log
python weights.py checkpoints weights
python - <<'END'
import torch
saved = torch.load("checkpoints/global_step20_universal/zero/0.weight/fp32.pt", weights_only=True)
found = torch.load("weights/pytorch_model.bin", weights_only=True)
print("weights without the package:", torch.equal(saved["param"], found["0.weight"]))
END
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the page's commands print."""
    folder = tmp_path_factory.mktemp("moving")
    script, weights = blocks(PAGE, "python")
    (folder / "move.py").write_text(script)
    (folder / "weights.py").write_text(weights)
    absent = folder / "absent" / "adapprox_ds"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('adapprox_ds')\n")
    commands = "\n".join([*blocks(PAGE, "bash"), WITHOUT_US])
    return printed(["bash", "-euo", "pipefail", "-c", commands], folder)


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


def test_weights_are_read_without_the_package(output: str) -> None:
    """By the page's script, where DeepSpeed's fails."""
    assert "weights without the package: True" in output
