# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check`` at small sizes, in Triton's interpreter; and where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == check.NO_DEVICE
    assert "no GPU is here" in capsys.readouterr().out


def test_the_small_form(tmp_path: Path) -> None:
    """All parts but DeepSpeed's, which other tests have; a table and a JSON of all."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.gpu.check", "--cpu", "--results", str(path)]
    done = subprocess.run(
        [*command, "--only", *check.PARTS[:-1]],
        cwd=Path(check.ROOT),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert len(found["kernels"]) == 5 and not any(found["kernels"].values())
    assert len(found["self_check"]) == 4 and found["waits"]
    assert found["bench"]["optimizers"]["Adapprox, k = 8"]["ratio"] > 0 and found["bench"]["srsi"]
    assert "| Adapprox, k = 8 |" in done.stdout and "all that was checked is right" in done.stdout


def test_failures_are_told() -> None:
    found = {
        "kernels": {"codes": "AssertionError in close: w", "bf16": ""},
        "self_check": {"k = 8": {"seconds": 1.0, "verdict": "y differ"}},
        "waits": {"Adapprox": ["called a synchronizing operation"], "MicroAdam": []},
        "deepspeed": {"error": "no"},
    }
    assert [x.partition(":")[0] for x in check.failures(found)] == [
        "deepspeed", "kernels, codes", "self-check, k = 8", "Adapprox waits",
    ]  # fmt: skip
