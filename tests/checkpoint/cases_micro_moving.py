# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's checkpoints and other optimizers' tools. Run by test_universal.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapprox_ds.checkpoint import CheckpointError, convert, load_universal
from adapprox_ds.checkpoint.inspect import inspect
from tests.checkpoint.cases_moving import TAG, convert_by_deepspeed, record_of
from tests.checkpoint.cases_universal import HALF, gather, start, train
from tests.zero.cases_stages import adapprox_of


def content(path: Path) -> Tensor:
    held = torch.load(path)
    return (held["param"] if isinstance(held, dict) else held).reshape(-1)


def dense_for_adamw(source: str, kind: str, folder: Path) -> None:
    """Our converter and DeepSpeed's own make Adam's moments; Adapprox, as AdamW, goes on with them.

    MicroAdam refuses them, as it does Adapprox's, and Adapprox those of MicroAdam.
    """
    record, run = record_of(source, folder)
    ours, stock = folder / "ours" / "a_universal", folder / "stock" / "a_universal"
    if torch.distributed.get_rank() == 0:
        convert(run / TAG, ours, workers=1, second_moment="dense")
    convert_by_deepspeed(run / TAG, stock)
    for name, saved in record["saved"].items():
        for output in (ours, stock):
            for file, key in (("fp32", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "v")):
                found = content(output / "zero" / name / f"{file}.pt")
                torch.testing.assert_close(found, saved[key], rtol=1e-6, atol=1e-12)
    engine, _ = start("z3_fp32", empty=True)
    load_universal(engine, ours)
    assert all(
        torch.equal(found["exp_avg"], record["saved"][name]["exp_avg"])
        for name, found in gather(engine).items()
    )
    train(engine, HALF, HALF + 2)
    with pytest.raises(CheckpointError, match="state of MicroAdam, window of 4, which Adapprox"):
        load_universal(engine, run)
    engine.destroy()
    engine, _ = start(kind, empty=True)
    for output, message in (
        (ours, r"state of Adam, first moment of gradients, which MicroAdam cannot take over"),
        (stock, r"exp_avg\.pt holds a dense moment, as DeepSpeed's converter makes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_universal(engine, output)
    engine.destroy()


def other_settings(source: str, kind: str, folder: Path) -> None:
    """``load_groups=False``: the run's own window, density and bits hold; nothing else is lost."""
    record, run = record_of(source, folder)
    engine, _ = start(kind, empty=True)
    load_universal(engine, run, load_groups=False)
    optimizer = adapprox_of(engine)
    assert {g["window"] for g in optimizer.param_groups} == {9}
    for name, found in gather(engine).items():
        saved = record["saved"][name]
        for key in ("fp32", "exp_avg", "v", "error"):
            torch.testing.assert_close(found[key], saved[key], rtol=1e-6, atol=1e-12)
    train(engine, HALF, HALF + 2)
    engine.destroy()


def table(source: str, kind: str, folder: Path) -> None:
    """``inspect`` says whose state it is and what it takes, of either form."""
    _, run = record_of(source, folder)
    engine, _ = start(kind)
    train(engine, 0, 1)
    metrics = [adapprox_of(engine).metrics().state_bytes]
    everyone = [metrics] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, metrics)
    for path in (run / TAG, run):
        report = inspect(path)
        assert "; MicroAdam, window of 4" in report.title
        state = sum(row.first_bytes + row.second_bytes for row in report.rows)
        assert state == sum(sum(m) for m in everyone)
        assert all(row.ranks is None for row in report.rows)
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    "micro_dense": partial(dense_for_adamw, "z1_micro_2", "z1_micro"),
    "micro_other_settings": partial(other_settings, "z3_micro_2", "z2_micro_wide"),
    "micro_table": partial(table, "z1_micro_2", "z1_micro"),
}
