# SPDX-License-Identifier: Apache-2.0
"""The optimizer's metrics in DeepSpeed's own monitors, at stages 0 to 3 on two ranks."""

from __future__ import annotations

import importlib.util

import pytest

from adapprox_ds.adapprox.metrics import Metrics, ParameterMetrics
from adapprox_ds.report.monitor import layer_of, summary
from tests.report.cases_monitor import CASES

HERE = [c for c in CASES if c != "tensorboard" or importlib.util.find_spec("tensorboard")]


#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.report.cases_monitor", HERE)


@pytest.mark.parametrize("case", CASES)
def test_monitors(outcomes: dict[str, str], case: str) -> None:
    """See tests/report/cases_monitor.py."""
    if case not in HERE:
        pytest.skip("tensorboard is not installed")
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("transformer.h.3.mlp.c_fc.weight", "transformer.h.3"),
        ("model.layers.12.experts.5.w1", "model.layers.12"),
        ("0.weight", "0"),
        ("group0.7", "group0.7"),
        ("transformer.wte.weight", "transformer.wte"),
        ("block3.conv2d.weight", "block3.conv2d"),
        ("weight", "weight"),
    ],
)
def test_layer_of(parameter: str, layer: str) -> None:
    """The first number counts layers; where there is none, the module is one."""
    assert layer_of(parameter) == layer


def test_summary_leaves_out_what_is_not_known() -> None:
    """On an accelerator the first error ratios are on their way when the first event is due."""
    nan = float("nan")
    known = {
        "h.0.a": ParameterMetrics((8, 8), 4, 0.25, 64),
        "wte": ParameterMetrics((8, 8), 2, nan, 32),
    }
    unknown = {"h.0.b": ParameterMetrics((8, 8), 3, nan, 48)}
    parts = [
        Metrics(state_bytes=100, parameters=known),
        Metrics(state_bytes=10, parameters=unknown),
    ]
    assert summary(parts, layers=True) == {
        "mean_rank": 3.0,
        "mean_error": 0.25,
        "largest_error": 0.25,
        "state_bytes": 110,
        "rank/h.0": 3.5,
        "rank/wte": 2.0,
    }
    assert summary(parts[1:]) == {"mean_rank": 3.0, "state_bytes": 10}
