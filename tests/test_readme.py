# SPDX-License-Identifier: Apache-2.0
"""The README: its code runs, its tables are the result files'."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.world import free_port

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1])
def test_code_block_runs(block: str) -> None:
    """As one process, as a person would paste it."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = os.environ | one | {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", block], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "mean_rank=" in done.stdout


def test_commands_are_those_that_are_run() -> None:
    """Of "Moving a run": each is executed from docs/moving-a-run.md by test_moving_docs.py."""
    page = (ROOT / "docs/moving-a-run.md").read_text().splitlines()
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in commands for line in block.splitlines()]
    assert lines
    assert [line for line in lines if line not in page] == []


def test_there_are_code_blocks() -> None:
    """One for DeepSpeed, one for torch."""
    assert len(BLOCKS) == 2


def test_tables_are_the_result_files() -> None:
    """Regenerate with ``python examples/paper/readme_tables.py``."""
    script = ROOT / "examples/paper/readme_tables.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)
