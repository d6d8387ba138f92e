# SPDX-License-Identifier: Apache-2.0
"""The elastic example: two ranks, then one, beside two throughout."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import parse_args

from tests.project.cases_pretrain import ROOT, write_inputs
from tests.project.pages import forked

LEG = 3


@pytest.fixture
def elastic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The example, by the arguments of its command line."""
    main = runpy.run_path(str(ROOT / "examples" / "elastic" / "elastic.py"))["main"]

    def called(*given: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["elastic.py", *map(str, given)])
        main()

    monkeypatch.setattr(subprocess, "run", run)
    return called


def run(command: list[str], check: bool) -> None:
    """In place of ``subprocess.run``, by forks of one process: DeepSpeed's launcher and Python."""
    assert command[0] == sys.executable and check
    _, module, *arguments = command[1:]
    if module == "deepspeed.launcher.runner":
        given = parse_args(arguments)
        program = [given.user_script, "--local_rank={rank}", *given.user_args]
        forked(program, ranks=given.num_gpus)
    else:
        forked(command[1:])


def column(run: Path, key: str) -> dict[int, float]:
    """What a run wrote of each step; steps without a value are left out."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}


def test_elastic(
    tmp_path: Path, elastic: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first leg is the unbroken run, to the bit; the second goes with it."""
    write_inputs(tmp_path)
    folder = tmp_path / "elastic"
    given: list[Any] = ["--ranks", 2, 1, "--leg", LEG, "--batch", 4, "--folder", folder]
    given += ["--corpus", tmp_path / "text", "--deepspeed_config", tmp_path / "config.json"]
    elastic(*given)
    assert f"held-out loss after {2 * LEG} steps" in capsys.readouterr().out
    assert (folder / "elastic.png").read_bytes().startswith(b"\x89PNG")
    for key, steps, near in (("train_loss", 3, 5e-3), ("held_out_loss", 1, 5e-3), ("lr", 3, 0.0)):
        unbroken = column(folder / "unbroken-2-ranks", key)
        first = column(folder / "leg1-2-ranks", key)
        second = column(folder / "leg2-1-ranks", key)
        assert set(first) <= {1, 2, 3} and set(second) <= {4, 5, 6}
        assert len(first) >= steps and len(second) >= steps
        assert first == {step: unbroken[step] for step in first}
        assert second == pytest.approx({step: unbroken[step] for step in second}, rel=near)


def test_bad_arguments_are_named(
    elastic: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic("--ranks", 2, 5)
    assert "--ranks 5: must be at least 1 and divide --batch 12" in capsys.readouterr().err
