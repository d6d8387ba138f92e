# SPDX-License-Identifier: Apache-2.0
"""The elastic example: two ranks, then one, beside two throughout."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases_pretrain import ROOT, write_inputs
from tests.pages import printed

LEG = 3


def column(run: Path, key: str) -> dict[int, float]:
    """What a run wrote of each step; steps without a value are left out."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}


def test_elastic(tmp_path: Path) -> None:
    """The first leg is the unbroken run, to the bit; the second goes with it."""
    write_inputs(tmp_path)
    folder = tmp_path / "elastic"
    command = [sys.executable, str(ROOT / "examples" / "elastic" / "elastic.py")]
    command += ["--ranks", "2", "1", "--leg", str(LEG), "--batch", "4", "--folder", str(folder)]
    command += ["--corpus", str(tmp_path / "text")]
    command += ["--deepspeed_config", str(tmp_path / "config.json")]
    assert f"held-out loss after {2 * LEG} steps" in printed(command, tmp_path)
    assert (folder / "elastic.png").read_bytes().startswith(b"\x89PNG")
    for key, steps, near in (("train_loss", 3, 5e-3), ("held_out_loss", 1, 5e-3), ("lr", 3, 0.0)):
        unbroken = column(folder / "unbroken-2-ranks", key)
        first = column(folder / "leg1-2-ranks", key)
        second = column(folder / "leg2-1-ranks", key)
        assert set(first) <= {1, 2, 3} and set(second) <= {4, 5, 6}
        assert len(first) >= steps and len(second) >= steps
        assert first == {step: unbroken[step] for step in first}
        assert second == pytest.approx({step: unbroken[step] for step in second}, rel=near)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    script = ROOT / "examples" / "elastic" / "elastic.py"
    done = subprocess.run(
        [sys.executable, str(script), "--ranks", "2", "5"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--ranks 5: must be at least 1 and divide --batch 12" in done.stderr
