# SPDX-License-Identifier: Apache-2.0
"""docs/any-optimizer.md and examples/any_optimizer.py: what they show runs."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.world import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "any-optimizer.md").read_text()
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_the_page_s_code() -> None:
    """Its blocks in their order, as one script: factors of the shard's matrices, and a loss."""
    code = blocks("python")
    assert len(code) == 2
    printed = run(
        [sys.executable, "-c", "\n".join(code)], MASTER_PORT=str(free_port()), **ONE_PROCESS
    )
    assert len(re.findall(r"^loss \d", printed, re.MULTILINE)) == 2
    rows = "{'step': (), 'row_var': (256, 1), 'col_var': (1, 64)}"
    assert f"(0, 256, 64) {rows}" in printed


def test_the_example() -> None:
    """By the page's command: the loss falls; blocks have Muon's state, the rest AdamW's."""
    (command,) = blocks("bash")
    port = str(random.randint(20_000, 29_000))
    launcher = command.replace("deepspeed ", f"deepspeed --master_port {port} ", 1)
    printed = run(["bash", "-c", launcher], OMP_NUM_THREADS="1")
    losses = [float(loss) for loss in re.findall(r"step \d+ loss ([\d.]+)", printed)]
    assert losses[1] < losses[0] - 1
    (held,) = re.findall(r"([\d.]+) bytes of optimizer state a parameter", printed)
    # Half of 4 bytes for the 0.39 M in the blocks' matrices, half of 8 for the 0.04 M elsewhere:
    # of each size there are two matrices, one for each rank.
    assert float(held) == pytest.approx((2 * 393 + 4 * 44) / 437, abs=0.05)
