# SPDX-License-Identifier: Apache-2.0
"""The pretraining example as it is used: exact resume, SIGTERM, another number of ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tests.project.cases_pretrain import CASES, HALF, STEPS, write_inputs
from tests.world import run_world


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_inputs(folder / "shared")
    return folder


@pytest.fixture(scope="module")
def outcomes(scratch: Path) -> dict[str, str]:
    """The cases on two ranks, in one order: some use what others saved."""
    return run_world(2, "tests.project.cases_pretrain", list(CASES), scratch)


@pytest.mark.parametrize("case", CASES)
def test_runs_on_two_ranks(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case], outcomes[case]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_leaves_its_artefacts(outcomes: dict[str, str], scratch: Path) -> None:
    for name, loader in (("tiny", AutoModelForCausalLM), ("bert-tiny", AutoModelForMaskedLM)):
        folder = scratch / "shared" / "runs" / name
        rows = read_csv(folder / "metrics.csv")
        assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows if row["held_out_loss"]] == [str(HALF), str(STEPS)]
        assert {row["shard"] for row in read_csv(folder / "ranks.csv")} == {"0", "1"}
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]
        assert summary["model"] == name
        assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
        weights = torch.load(
            scratch / f"shared/saves-{name}/global_step{STEPS}/mp_rank_00_model_states.pt",
            weights_only=False,
        )["module"]
        exported = loader.from_pretrained(folder / "model").state_dict()
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[key], weights[key]) for key in weights)
