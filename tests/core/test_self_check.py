# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels are checked at first use, and torch takes the place of those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from adapprox_ds.adapprox.kernels import forms, tiles
from adapprox_ds.adapprox.kernels.interface import StepScalars
from adapprox_ds.core.kernels import backends, self_check
from tests import ROOT
from tests.core.cases_agreement import CASES
from tests.core.cases_self_check import CHECKS


def outcomes(program: str) -> dict[str, str]:
    """Name of a check -> what went wrong, from a program that interprets Triton."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop(backends.VARIABLE, None)
    command = [sys.executable, "-m", program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    return outcomes("tests.core.cases_self_check")


@pytest.fixture(scope="module")
def together() -> dict[str, str]:
    return outcomes("tests.core.cases_agreement")


@pytest.mark.parametrize("name", CHECKS)
def test_self_check_interpreted(name: str, alone: dict[str, str]) -> None:
    assert not alone[name], alone[name]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree(name: str, together: dict[str, str]) -> None:
    """On two ranks, of which one may have a broken kernel."""
    assert not together[name], together[name]


FULL, BRAIN, CODES = torch.float32, torch.bfloat16, torch.int8


@pytest.mark.parametrize("kinds", [(FULL, FULL, FULL), (BRAIN, BRAIN, BRAIN), (FULL, FULL, CODES)])
@pytest.mark.parametrize("wide", [(8, 10, 16), (128, 130, 136)])
def test_a_check_takes_less_than_a_second(
    kinds: tuple[torch.dtype, ...], wide: tuple[int, int, int]
) -> None:
    """Even where the other backend is as slow as torch on a CPU."""
    slices = SimpleNamespace(slices_of=lambda *_: {"RANK": wide[0]}, is_long=lambda _: False)
    slices.run = lambda *given, long: tiles.run(*given)
    of = (*kinds, torch.device("cpu"))
    stack, runs = forms._stack(wide, 64, *of), forms._runs(*of)
    s = StepScalars(0.9, 0.999, 1.0, 1.0, 1e-8, 1e-3, 0.1, False, True, True)
    with (
        mock.patch.dict(sys.modules, {"adapprox_ds.adapprox.kernels.triton_pass": slices}),
        mock.patch.object(self_check, "_verdicts", {}),
    ):
        began = time.perf_counter()
        assert forms.takes([stack], runs, s, True)
        assert len(self_check._verdicts) == 2
        assert time.perf_counter() - began < 2.0
