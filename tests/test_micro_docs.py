# SPDX-License-Identifier: Apache-2.0
"""docs/micro-adam.md: its code runs, its table and its command's output are true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapprox_ds.__main__ import main
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "micro-adam.md").read_text()


def test_code_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WindowMetrics(step=3" in done.stdout


def test_hyper_parameters_are_all_there_with_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
    defaults = MicroHyperparameters().as_group()
    shown = {n: f'"{v}"' if isinstance(v, str) else str(v) for n, v in defaults.items()}
    assert dict(rows) == shown


def test_the_page_shows_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    ((command, output),) = re.findall(
        r"```bash\npython -m adapprox_ds (.*?)\n```\n+```text\n(.*?)```", PAGE, re.DOTALL
    )
    assert main(command.split()) == 0
    assert capsys.readouterr().out == output
