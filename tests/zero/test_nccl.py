# SPDX-License-Identifier: Apache-2.0
"""Collectives by NCCL's rules: tensors on its device, contiguous, of dtypes that it has."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import distributed

from adapprox_ds.core.peers import place_of
from tests import ROOT
from tests.world import run_world

pytest.importorskip("deepspeed")
from tests.zero.cases_nccl import CASES

PACKAGE = ROOT / "adapprox_ds"
#: Asks through a process group of its own, which is gloo's whatever the others are.
OWN_GROUP = {"report.monitor._gather"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    scratch = tmp_path_factory.mktemp("world")
    return run_world(2, "tests.zero.cases_nccl", list(CASES), scratch), scratch


@pytest.mark.parametrize("case", CASES)
def test_case(outcomes: tuple[dict[str, str], Path], case: str) -> None:
    """See tests/zero/cases_nccl.py."""
    assert not outcomes[0][case], outcomes[0][case]


@pytest.mark.parametrize(
    ("backends", "bound", "device", "place"),
    [
        ("cuda:nccl", None, "cpu", "cuda"),
        ("cuda:nccl", "cuda:3", "cpu", "cuda:3"),
        # Before the engine is there, the current device may be another's.
        ("cuda:nccl", "cuda:3", "cuda:0", "cuda:3"),
        ("cuda:nccl", None, "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda:3", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:3", "cuda:0", "cuda:3"),
        ("cpu:gloo,cuda:gloo", None, "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:gloo", None, "xpu:0", "cpu"),
        ("xpu:xccl", None, "cpu", "xpu"),
    ],
)
def test_place_of(backends: str, bound: str | None, device: str, place: str) -> None:
    group = SimpleNamespace(bound_device_id=torch.device(bound) if bound else None)
    with mock.patch.object(distributed, "get_backend_config", return_value=backends):
        assert place_of(group, torch.device(device)) == torch.device(place)


def sites_of(tree: ast.AST, module: str, within: str = "") -> set[str]:
    """Functions, "module.function", that call what sends something to other ranks."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else within
        sends = isinstance(node, ast.Attribute) and ast.unparse(node.value) in MODULES
        if sends and node.attr.startswith(SENDING) and within:
            found.add(f"{module}.{within}")
        found |= sites_of(node, module, name)
    return found


MODULES = {"comm", "dist", "distributed", "torch.distributed"}
SENDING = (
    *("all_reduce", "all_gather", "all_to_all", "reduce", "broadcast", "gather", "scatter"),
    *("send", "recv", "isend", "irecv", "barrier", "batch", "monitored"),
)


def test_every_collective_was_looked_at(outcomes: tuple[dict[str, str], Path]) -> None:
    """Each function of the package that sends something did so in a case."""
    written: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        written |= sites_of(ast.parse(path.read_text()), module)
    files = [outcomes[1] / case / "sites.json" for case in CASES]
    seen = {site for file in files for site in json.loads(file.read_text())}
    assert written - OWN_GROUP == seen
