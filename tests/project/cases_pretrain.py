# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the pretraining example on a small corpus. Run by test_pretrain_runs.py."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import adapprox_ds
from tests import ROOT

sys.path.insert(0, str(ROOT / "examples" / "pretrain"))

from sampling import WindowSampler
from train import compare, parse_arguments, run

STEPS, HALF, STOPPED = 6, 3, 2

Batches = list[tuple[int, int, int]]


def write_inputs(folder: Path) -> None:
    """A corpus of random words, each document with a few of its own, and a config."""
    chooser = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for index in range(24):
        lexicon = ["".join(chooser.choices("etaoinshrdlu", k=5)) for _ in range(8)]
        text = " ".join(chooser.choices(lexicon, k=900))
        (folder / "text" / f"{index:02}.txt").write_text(text)
    settings = json.loads((ROOT / "ds_configs" / "ds_adapprox.json").read_text())
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 2
    # CPUs without instructions for bf16 take ten times as long for its products.
    settings["bf16"]["enabled"] = False
    settings["scheduler"]["params"] |= {"warmup_num_steps": 2, "total_num_steps": STEPS}
    (folder / "config.json").write_text(json.dumps(settings))


def arguments(shared: Path, name: str, *others: str | Path) -> list[str]:
    """A command line: rows of every step, and two evaluations."""
    given = ["--deepspeed_config", shared / "config.json", "--corpus", shared / "text"]
    given += ["--runs", shared / "runs", "--name", name]
    given += ["--log-interval", "1", "--eval-interval", str(HALF), *others]
    return [str(argument) for argument in given]


def train(shared: Path, name: str, *others: str | Path, stop_at: int | None = None) -> Batches:
    """Runs the example.

    Args:
        shared: What ``write_inputs`` filled.
        name: Of the run.
        others: More arguments.
        stop_at: The step in which rank 1, and no other, gets SIGTERM.

    Returns:
        This rank's batches, as windows an epoch, first window and number of windows.
    """
    rank = dist.get_rank()
    sys.argv = ["train.py", *arguments(shared, name, *others), "--local_rank", str(rank)]
    with recorded_batches() as batches:
        if stop_at is not None and rank == 1:
            batches.on_batch[2 * stop_at] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        run(parse_arguments())
    dist.barrier()
    return batches.seen


class _Recording:
    def __init__(self) -> None:
        self.seen: Batches = []
        self.on_batch: dict[int, Callable[[], None]] = {}


@contextmanager
def recorded_batches() -> Iterator[_Recording]:
    """Notes what the samplers serve."""
    recording, batch = _Recording(), WindowSampler.batch

    def noted(self: WindowSampler, first: int, size: int) -> Any:
        recording.seen.append((len(self), first, size))
        recording.on_batch.get(len(recording.seen), lambda: None)()
        return batch(self, first, size)

    WindowSampler.batch = noted  # type: ignore[method-assign]
    try:
        yield recording
    finally:
        WindowSampler.batch = batch  # type: ignore[method-assign]


def require_same_weights(one: Path, other: Path) -> None:
    """This rank's fp32 weights in two checkpoints are equal to the bit."""
    file = f"zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt"
    groups = [
        torch.load(folder / file, weights_only=False)["optimizer_state_dict"][
            "single_partition_of_fp32_groups"
        ]
        for folder in (one, other)
    ]
    assert len(groups[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*groups, strict=True))


def point_at(checkpoints: Path, tag: str) -> None:
    if dist.get_rank() == 0:
        (checkpoints / "latest").write_text(tag)
    dist.barrier()


def resumes(model: str, folder: Path) -> None:
    """The whole is a half, a checkpoint and a half: batches, weights and all that is measured."""
    shared = folder.parent / "shared"
    saves, again = shared / f"saves-{model}", folder / "again"
    options = ["--model", model]
    batches = train(shared, model, *options, "--save-dir", saves, "--save-interval", str(HALF))
    metrics = (shared / "runs" / model / "metrics.csv").read_text()
    point_at(saves, f"global_step{HALF}")
    resumed = train(shared, model, *options, "--load", saves, "--save-dir", again)
    assert batches[-len(resumed) :] == resumed
    assert len({batch for batch in batches if batch[0] == batches[0][0]}) == 2 * STEPS
    require_same_weights(saves / f"global_step{STEPS}", again / f"global_step{STEPS}")
    lines = (shared / "runs" / model / "metrics.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in lines] == [
        line.rsplit(",", 1)[0] for line in metrics.splitlines()
    ]  # all columns but the last, seconds


def saves_on_sigterm(folder: Path) -> None:
    """One rank's SIGTERM stops all after the same step, and the run goes on as if unbroken."""
    shared = folder.parent / "shared"
    saves, again = folder / "saves", folder / "again"
    before = signal.getsignal(signal.SIGTERM)
    train(shared, "stopped", "--save-dir", saves, "--save-on-sigterm", stop_at=STOPPED)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (saves / "latest").read_text() == f"global_step{STOPPED}"
    assert not (shared / "runs" / "stopped" / "summary.json").exists()
    train(shared, "stopped", "--load", saves, "--save-dir", again, "--steps", str(HALF))
    require_same_weights(shared / "saves-tiny" / f"global_step{HALF}", again / f"global_step{HALF}")


def converts(folder: Path) -> None:
    """Leaves a universal checkpoint of the first half for another world size."""
    if dist.get_rank() == 0:
        saved = folder.parent / "shared" / "saves-tiny" / f"global_step{HALF}"
        adapprox_ds.convert(saved, saved.with_name(f"{saved.name}_universal"))
    dist.barrier()


def compares(folder: Path) -> None:
    """The same run again with AdamW on the same data from the same weights, in one picture."""
    shared, rank = folder.parent / "shared", dist.get_rank()
    given = arguments(shared, "compared", "--steps", "2", "--compare")
    sys.argv = ["train.py", *given, "--local_rank", str(rank)]
    args = parse_arguments()
    compare(args, run(args))
    dist.barrier()
    if rank == 0:
        runs = shared / "runs"
        ours, theirs = (
            json.loads((runs / name / "summary.json").read_text())
            for name in ("compared", "compared-adamw")
        )
        assert ours["optimizer_state_bytes"] < theirs["optimizer_state_bytes"]
        # And the count of steps of each shard.
        dense = theirs["adamw_state_bytes"]
        assert dense <= theirs["optimizer_state_bytes"] < 1.001 * dense
        first = [(runs / name / "metrics.csv").read_text().split()[1].split(",")[1] for name in
                 ("compared", "compared-adamw")]  # fmt: skip
        assert first[0] == first[1], "the first loss is of the same weights and windows"
        assert (runs / "compared" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    sys.argv += ["--save-dir", str(folder)]
    with pytest.raises(SystemExit):
        parse_arguments()


CASES: dict[str, Callable[[Path], None]] = {
    "compares": compares,
    "gpt2_resumes": partial(resumes, "tiny"),
    "bert_resumes": partial(resumes, "bert-tiny"),
    "saves_on_sigterm": saves_on_sigterm,
    "converts": converts,
}
