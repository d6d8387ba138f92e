# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, evaluations, rows, checkpoints."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import deepspeed.comm as dist
import torch
from tqdm import tqdm

from modeling import token_loss
from recording import MetricsRow, RunRecorder
from telemetry import OptimizerReading, read_optimizer
from termination import termination_requests

INTERIM_WINDOWS = 256  # held-out windows of an evaluation on the way; the last one takes all


class Sampler(Protocol):
    """What serves the batches."""

    def __len__(self) -> int:
        """Windows in one epoch."""

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of ``size`` windows of an endless sequence, from ``first`` on."""


class Trainer:
    """Trains an engine on windows of text.

    Args:
        args: The command line of ``train.py``.
        engine: Fresh, or as loaded from a checkpoint: its counters say where to go on.
        train_data: The same sequence of windows on every rank.
        held_out_data: The same for the evaluations.

    Attributes:
        recorder: Of rank 0; ``None`` on the others.
    """

    def __init__(
        self, args: argparse.Namespace, engine: Any, train_data: Sampler, held_out_data: Sampler
    ) -> None:
        self.args, self.engine = args, engine
        self.train_data, self.held_out_data = train_data, held_out_data
        self.recorder = (
            RunRecorder(args.runs / args.name, engine.global_steps)
            if dist.get_rank() == 0
            else None
        )

    def run(self) -> tuple[float, OptimizerReading] | None:
        """Trains up to ``--steps``, then evaluates; every rank calls it.

        Returns:
            The loss on all held-out text, and the optimizer's state at the end; ``None`` where
            SIGTERM stopped the run, which then left a checkpoint.
        """
        if not self.args.save_on_sigterm:
            return self._run(lambda: False)
        with termination_requests(self.engine.device) as requested:
            return self._run(requested)

    def _run(self, requested: Callable[[], bool]) -> tuple[float, OptimizerReading] | None:
        args, engine = self.args, self.engine
        start = engine.global_steps
        bar = tqdm(
            total=args.steps,
            initial=start,
            desc=args.name,
            unit="step",
            disable=self.recorder is None,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        held_out = math.nan
        # Losses stay on the device between rows: reading one would wait for the accelerator.
        loss_sum, since, clock = torch.zeros((), device=engine.device), start, time.perf_counter()
        for step in range(start + 1, args.steps + 1):
            lr = engine.get_lr()[0]
            loss_sum += self._train_step()
            bar.update()
            last, stops = step == args.steps, requested()
            evaluates = last or step % args.eval_interval == 0
            if evaluates or stops or step % args.log_interval == 0:
                dist.all_reduce(loss_sum)
                train_loss = loss_sum.item() / (step - since) / dist.get_world_size()
                seconds = (time.perf_counter() - clock) / (step - since)
                reading = read_optimizer(engine, step)
                if evaluates:
                    held_out = self._evaluate(everything=last)
                if self.recorder is not None:
                    row = MetricsRow(
                        step=step,
                        train_loss=train_loss,
                        held_out_loss=held_out if evaluates else None,
                        lr=lr,
                        mean_rank=reading.mean_rank,
                        mean_error=reading.mean_error,
                        state_bytes=reading.state_bytes,
                        step_seconds=seconds,
                    )
                    self.recorder.add(row, reading.ranks)
                    bar.set_postfix_str(_describe(row), refresh=False)
                loss_sum, since, clock = torch.zeros_like(loss_sum), step, time.perf_counter()
            due = args.save_interval and step % args.save_interval == 0
            if args.save_dir and (last or stops or due):
                engine.save_checkpoint(str(args.save_dir))
            if stops and not last:
                bar.close()
                return None
        bar.close()
        return held_out, reading

    def _train_step(self) -> torch.Tensor:
        """One optimizer step; returns this rank's mean loss, on the device."""
        engine, size = self.engine, self.engine.train_micro_batch_size_per_gpu()
        accumulation = engine.gradient_accumulation_steps()
        loss_sum = torch.zeros((), device=engine.device)
        # A batch's place follows from the windows trained on so far, which the engine counts and
        # saves: a resumed run needs no sampler state, and may go on with another batch size.
        first = engine.global_samples + dist.get_rank() * size
        for micro in range(accumulation):
            start = first + micro * dist.get_world_size() * size
            inputs, targets = self.train_data.batch(start, size)
            logits = engine(input_ids=inputs.to(engine.device)).logits
            loss = token_loss(logits, targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        return loss_sum / accumulation

    @torch.no_grad()
    def _evaluate(self, everything: bool) -> float:
        """Held-out loss in nats a token over ``INTERIM_WINDOWS`` or all windows, all ranks."""
        engine, data = self.engine, self.held_out_data
        windows = len(data) if everything else min(len(data), INTERIM_WINDOWS)
        size = engine.train_micro_batch_size_per_gpu()
        stride = dist.get_world_size() * size
        total = torch.zeros(2, device=engine.device)  # nats, tokens
        engine.eval()
        # ZeRO-3 needs the same number of forwards on every rank: windows past the end are masked.
        for first in range(0, windows, stride):
            start = first + dist.get_rank() * size
            inputs, targets = data.batch(start, size)
            targets = targets.clone()
            targets[max(0, windows - start) :] = -100
            logits = engine(input_ids=inputs.to(engine.device)).logits
            total[0] += token_loss(logits, targets.to(engine.device), reduction="sum")
            total[1] += (targets >= 0).sum()
        engine.train()
        dist.all_reduce(total)
        return (total[0] / total[1]).item()


def _describe(row: MetricsRow) -> str:
    parts = [f"loss {row.train_loss:.3f}", f"lr {row.lr:.1e}"]
    if row.mean_rank is not None:
        parts.append(f"rank {row.mean_rank:.1f}")
    return ", ".join(parts)
