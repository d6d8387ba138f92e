# SPDX-License-Identifier: Apache-2.0
"""The estimator's row of MicroAdam, against states that are allocated."""

from __future__ import annotations

import pytest
import torch

from adapprox_ds import MicroAdam
from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.report.estimate import estimate, report
from adapprox_ds.report.model_shapes import load_shapes
from tests.report.test_estimate import MIXED, zero_fragments


@pytest.mark.parametrize("world", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_simulated_shards(stage: int, world: int) -> None:
    """Each rank's to the byte; shards of padding alone among them."""
    groups = [MIXED, {"big": (3, 5000), "bias": (7,)}]
    windows, errors = [0] * world, [0] * world
    for rank in range(world):
        for group in groups:
            layout = ShardLayout.build(*zero_fragments(group, stage, world, rank))
            p = torch.nn.Parameter(torch.zeros(layout.numel))
            optimizer = MicroAdam([p])
            optimizer.shards.layouts[p] = layout
            optimizer.init_state()
            window, error = (optimizer.state[p][key].store for key in ("exp_avg", "error"))
            windows[rank] += window.indices.nbytes + window.values.nbytes
            errors[rank] += error.codes.nbytes + error.low.nbytes + error.high.nbytes
    held = estimate(groups, stage=stage, world=world)
    assert held.micro_adam.first == tuple(windows)
    assert held.micro_adam.second == tuple(errors)


@pytest.mark.parametrize("name", ["gpt2-124m", "bert-base", "llama-3-8b"])
def test_less_than_a_byte_a_parameter(name: str) -> None:
    """At window 10 and density 1 %: whole models and shards on many ranks."""
    for stage, world in ((0, 1), (2, 64), (3, 64)):
        held = estimate(load_shapes(name), stage=stage, world=world)
        assert 0.95 < sum(held.micro_adam.state) / held.numel < 1.0
    assert "MicroAdam" in report(name, stage=0, world=1)


def test_a_real_model_to_the_byte() -> None:
    """GPT-2 124M's state, allocated without memory."""
    shapes = load_shapes("gpt2-124m")
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes.values()]
    optimizer = MicroAdam(params)
    optimizer.init_state()
    held = estimate(shapes, stage=0, world=1)
    assert optimizer.metrics().state_bytes == held.micro_adam.largest
