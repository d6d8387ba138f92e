# SPDX-License-Identifier: Apache-2.0
"""Ranks and conversions that are killed, and disks that are full: what was saved is not lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import ROOT

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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What failed in each case of killing.py; its processes are a group, which ends with it."""
    scratch = tmp_path_factory.mktemp("killing")
    command = [sys.executable, "-m", "tests.faults.killing", str(scratch), "0"]
    process = subprocess.Popen(
        [*command, *(f"{case}={kills * FACTOR}" for case, kills in CASES.items())],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=900 * FACTOR)
    finally:
        left = True
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            left = False
        process.wait()
    assert process.returncode == 0, output[-6000:]
    assert not left, f"processes were left behind:\n{output[-3000:]}"
    found: dict[str, str] = json.loads((scratch / "outcomes.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_killing(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case], outcomes[case]
