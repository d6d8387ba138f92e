# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels are checked at first use, and torch takes the place of those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapprox_ds import kernels
from tests.cases_self_check import CHECKS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def interpreter() -> dict[str, str]:
    """Name of a check -> what went wrong, from a process that interprets Triton."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop(kernels.VARIABLE, None)
    command = [sys.executable, "-m", "tests.cases_self_check"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_self_check_interpreted(name: str, interpreter: dict[str, str]) -> None:
    assert not interpreter[name], interpreter[name]
