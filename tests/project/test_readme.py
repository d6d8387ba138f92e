# SPDX-License-Identifier: Apache-2.0
"""The README: its code runs, its tables are the result files'."""

from __future__ import annotations

import sys

import pytest

from tests.project.pages import ROOT, blocks, one_process, printed

#: One for DeepSpeed, one for torch.
FIRST, SECOND = blocks("README.md", "python")


@pytest.mark.parametrize("block", [FIRST, SECOND], ids=lambda block: block.splitlines()[1])
def test_code_block_runs(block: str) -> None:
    """As one process, as a person would paste it."""
    assert "mean_rank=" in printed([sys.executable, "-c", block], **one_process())


def test_tables_are_the_result_files() -> None:
    """Regenerate with ``python examples/paper/readme_tables.py``."""
    printed([sys.executable, str(ROOT / "examples/paper/readme_tables.py"), "--check"])
