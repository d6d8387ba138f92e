# SPDX-License-Identifier: Apache-2.0
"""The pretraining example under ``mpirun``: DeepSpeed finds its ranks through MPI."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.project.cases_pretrain import write_inputs
from tests.project.pages import ROOT, printed
from tests.world import free_port

PAGE = (ROOT / "docs" / "clusters.md").read_text()
MPIRUN = shutil.which("mpirun")


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun (openmpi-bin)")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py (pip: .[mpi])")
def test_command_of_the_page_trains_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = re.findall(r"^mpirun .*$", PAGE, re.MULTILINE)
    for name in ("examples", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_inputs(tmp_path / "inputs")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    launcher_left = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
    for name in launcher_left:
        monkeypatch.delenv(name, raising=False)
    env = {
        # Not the whole of the interpreter's folder: with ninja on the path DeepSpeed would first
        # compile an operator that this test does not need.
        "PATH": f"{tmp_path}:{Path(MPIRUN or '').parent}:/usr/bin:/bin",
        "MASTER_PORT": str(free_port()),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
    }
    options = ["--corpus", "inputs/text", "--steps", "2", "--log-interval", "1"]
    printed([*shlex.split(command), *options], tmp_path, **env)
    run = tmp_path / "runs" / "pretrain-tiny"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2
    with (run / "ranks.csv").open(newline="") as file:
        assert {row["shard"] for row in csv.DictReader(file)} == {"0", "1"}
