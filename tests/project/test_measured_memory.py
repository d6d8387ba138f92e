# SPDX-License-Identifier: Apache-2.0
"""examples/paper/measured_memory.py: its meter, its count, and one small run of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests import ROOT

MIB = 2**20
ADAMW, PAPER = "AdamW, fused", "Adapprox, paper, k = 8"
INT8 = "Adapprox, k = 8, int8 first moment"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples/paper")
    return importlib.import_module("measured_memory")


@pytest.mark.skipif(sys.platform != "linux", reason="the meter is Linux's")
def test_what_a_call_takes_for_a_while(script: ModuleType) -> None:
    """Neither what it keeps, nor what it gives back of what was there, nor an older peak."""
    kept = [torch.ones(64 * MIB // 4), torch.ones(64 * MIB // 4)]
    del kept[0]

    def brief() -> None:
        torch.ones(48 * MIB // 4)

    def exchange() -> None:
        kept.append(torch.ones(40 * MIB // 4))
        kept.pop(0)

    meter = script.ProcessMeter()
    assert script.extra_bytes(meter, brief) == pytest.approx(48 * MIB, abs=2 * MIB)
    assert script.extra_bytes(meter, exchange) == pytest.approx(40 * MIB, abs=2 * MIB)
    keep = script.extra_bytes(meter, lambda: kept.append(torch.ones(48 * MIB // 4)))
    assert keep == pytest.approx(0, abs=2 * MIB)


def test_storages_are_counted_once_and_whole(script: ModuleType) -> None:
    """Two views of a buffer are the buffer."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.AdamW([p])
    buffer = torch.zeros(1000)
    optimizer.state[p] = {"step": torch.tensor(1.0), "a": buffer[:10], "b": buffer[10:30]}
    assert script.state_bytes(optimizer) == 4000
    optimizer.state[p]["projector"] = SimpleNamespace(ortho_matrix=torch.zeros(5))
    assert script.state_bytes(optimizer) == 4020


@pytest.mark.skipif(sys.platform != "linux", reason="the meter is Linux's")
def test_a_small_run(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """State as counted by hand; the paper's step takes matrices whole, the default's does not."""

    def run(*names: str) -> dict[str, Any]:
        script.main(["--model", "tiny", "--only", *names, "--results", str(tmp_path)])
        return read()

    def read() -> dict[str, Any]:
        return json.loads((tmp_path / "measured_memory_tiny.json").read_text())["optimizers"]

    rows = run(INT8, PAPER)
    assert capsys.readouterr().out.count("+0.000 %") == 2
    monkeypatch.setitem(script.ESTIMATED_AS, ADAMW, "AdamW8bit")
    with pytest.raises(SystemExit, match=f"{ADAMW}: state and estimate differ by .+29"):
        run(ADAMW)
    rows |= read()
    shapes = [p.shape for p in script.GPT2LMHeadModel(script.MODELS["tiny"]).parameters()]
    matrices = [s for s in shapes if len(s) == 2]
    numel, cells = (sum(s.numel() for s in part) for part in (shapes, matrices))
    second = 4 * (8 * sum(sum(s) for s in matrices) + numel - cells)
    assert rows[ADAMW]["state_bytes"] == 8 * numel
    assert rows[PAPER]["state_bytes"] == 4 * numel + second
    assert numel + second < rows[INT8]["state_bytes"] < 1.1 * numel + second
    largest = max(4 * s.numel() for s in matrices)
    assert rows[ADAMW]["step_bytes"] < MIB
    assert rows[INT8]["step_bytes"] < largest < rows[PAPER]["step_bytes"]
    for row in rows.values():
        assert row["parameters"] == numel
        assert row["peak_bytes"] > row["state_bytes"] + 2 * 4 * numel
