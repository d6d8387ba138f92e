# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/moving-a-run.md, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "moving-a-run.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


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
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the page's commands print."""
    folder = tmp_path_factory.mktemp("moving")
    script, weights = blocks("python")
    (folder / "move.py").write_text(script)
    (folder / "weights.py").write_text(weights)
    absent = folder / "absent" / "adapprox_ds"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('adapprox_ds')\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*blocks("bash"), WITHOUT_US])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_the_run_goes_on(printed: str) -> None:
    """Losses fall on after each move; a fresh start would be far above."""
    steps = [
        (int(step), float(loss)) for step, loss in re.findall(r"step (\d+) loss ([\d.]+)", printed)
    ]
    assert {step for step, _ in steps[:2]} == {20}
    assert {step for step, _ in steps[2:]} == {30}
    assert max(loss for _, loss in steps[2:]) < min(loss for _, loss in steps[:2])


def test_inspect_says_what_there_is(printed: str) -> None:
    """The native checkpoint and the universal one."""
    assert (
        len(re.findall("of stage 2 on 2 processes; Adapprox, first moment of gradients", printed))
        == 2
    )
    assert len(re.findall(r"0\.weight +256x64 +\d+(?:-\d+ x2)? ", printed)) == 2


def test_weights_are_read_without_the_package(printed: str) -> None:
    """By the page's script, where DeepSpeed's fails."""
    assert "weights without the package: True" in printed


def test_the_page_has_commands() -> None:
    """Else nothing was tested."""
    commands = "\n".join(blocks("bash"))
    assert commands.count("python -m adapprox_ds convert") == 2
    assert commands.count("torchrun") == 3
