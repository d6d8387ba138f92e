# SPDX-License-Identifier: Apache-2.0
"""Ranks and conversions that are killed, and disks that are full: what was saved is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Cases of killing.py, with kills in steps, and as many in saves or in conversions: 20 of each in
#: all, and more by the variable.
CASES = {
    "one_rank": 14,
    "two_ranks": 6,
    "converting": 20,
    "converting_workers": 1,
    "full_disk_converting": 1,
    "full_disk_saving": 1,
}
FACTOR = int(os.environ.get("ADAPPROX_KILLS", "1"))


@pytest.mark.parametrize("case", CASES)
def test_killing(tmp_path: Path, case: str) -> None:
    """See killing.py; the case's processes are a group of their own, which ends with it."""
    kills = CASES[case] * FACTOR
    command = [sys.executable, "-m", "tests.faults.killing", case, str(tmp_path), str(kills), "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600 * FACTOR)
    finally:
        left = True
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            left = False
        process.wait()
    assert process.returncode == 0, output[-6000:]
    assert not left, f"processes were left behind:\n{output[-3000:]}"
