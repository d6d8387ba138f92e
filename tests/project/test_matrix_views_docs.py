# SPDX-License-Identifier: Apache-2.0
"""docs/any-optimizer.md and examples/any_optimizer.py: what they show runs."""

from __future__ import annotations

import random
import re
import sys

import pytest

from tests.project.pages import blocks, one_process, printed

PAGE = "docs/any-optimizer.md"


def test_the_page_s_code() -> None:
    """Its blocks in their order, as one script: factors of the shard's matrices, and a loss."""
    code = blocks(PAGE, "python")
    assert len(code) == 2
    found = printed([sys.executable, "-c", "\n".join(code)], **one_process())
    assert len(re.findall(r"^loss \d", found, re.MULTILINE)) == 2
    rows = "{'step': (), 'row_var': (256, 1), 'col_var': (1, 64)}"
    assert f"(0, 256, 64) {rows}" in found


def test_the_example() -> None:
    """By the page's command: the loss falls; blocks have Muon's state, the rest AdamW's."""
    (command,) = blocks(PAGE, "bash")
    port = str(random.randint(20_000, 29_000))
    launcher = command.replace("deepspeed ", f"deepspeed --master_port {port} ", 1)
    found = printed(["bash", "-c", launcher], OMP_NUM_THREADS="1")
    losses = [float(loss) for loss in re.findall(r"step \d+ loss ([\d.]+)", found)]
    assert losses[1] < losses[0] - 1
    (held,) = re.findall(r"([\d.]+) bytes of optimizer state a parameter", found)
    # Half of 4 bytes for the 0.39 M in the blocks' matrices, half of 8 for the 0.04 M elsewhere:
    # of each size there are two matrices, one for each rank.
    assert float(held) == pytest.approx((2 * 393 + 4 * 44) / 437, abs=0.05)
