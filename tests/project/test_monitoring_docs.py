# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/monitoring.md, as they stand there."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from adapprox_ds.report.plot import draw
from adapprox_ds.report.runs import read_run
from tests.project.pages import ROOT, blocks, printed

PAGE = "docs/monitoring.md"


def test_the_page_is_true(tmp_path: Path) -> None:
    """Its script trains both optimizers under ZeRO-2, and its picture is that of their logs."""
    (script,), (commands,) = blocks(PAGE, "python"), blocks(PAGE, "bash")
    (tmp_path / "compare.py").write_text(script)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for command, arguments in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (binaries / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (binaries / command).chmod(0o755)
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    found = printed(shell, tmp_path, PATH=f"{binaries}:{os.environ['PATH']}")
    assert "wrote monitoring.png\nwrote run.html\nAdapprox " in found
    page = (ROOT / PAGE).read_text()
    made, kept = (
        tmp_path / "monitoring.png",
        ROOT / "docs" / re.findall(r"!\[.*?\]\((.*?)\)", page)[0],
    )
    # Equal in size: signature, header with width and height.
    assert made.read_bytes()[:24] == kept.read_bytes()[:24]

    runs = [read_run(tmp_path / "logs" / name) for name in ("Adapprox", "AdamW")]
    assert [axes.get_title() for axes in draw(runs).axes] == [
        "Loss over steps",
        "Loss over time (not recorded: AdamW)",
        "Rank of the second moment: Adapprox",
    ]
    for run in runs:
        assert set(run.losses) == {"training", "held out"}
        for steps, values in run.losses.values():
            assert steps == list(range(10, 121, 10))
            assert values[-1] < values[0] - 0.5
    ours = runs[0]
    assert ours.mean_rank is not None
    assert ours.mean_rank.steps == list(range(10, 121, 10))
    assert list(ours.layers)[-3:] == [f"blocks.layers.{i}" for i in range(3)]
    # The events of the page's table are those that were written.
    events = set(re.findall(r"`Adapprox/(\w+)", page)) - {"rank"}
    found = {path.stem for path in (tmp_path / "logs" / "Adapprox").glob("Adapprox_*")}
    assert {name for name in found if "rank_" not in name} == {f"Adapprox_{e}" for e in events}
