# SPDX-License-Identifier: Apache-2.0
"""Ranks that are forked from a process which has imported DeepSpeed, so that many can be killed.

The parent starts no thread and no process group: only what it forks does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.world import free_port

#: How long the ranks that are left may go on after one was killed, before a launcher ends them.
GRACE_S = 0.5
#: A rank that takes longer hangs.
LIMIT_S = 120.0


@dataclass
class Bomb:
    """Counts what this process's Python calls, and kills it at one of the calls.

    Attributes:
        at: the call to die at; None to count only.
        calls: how many there were.
    """

    at: int | None = None
    calls: int = 0

    def __enter__(self) -> Bomb:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        if self.at is not None:  # there were fewer calls this time
            os.kill(os.getpid(), signal.SIGKILL)

    def _count(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], None], log: Path) -> int:
    """Do ``work`` in a child; it exits with 0, or with 1 and what failed at the log's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        status = 0
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) and error.code else 1  # type: ignore[assignment]
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def join(pids: list[int]) -> list[int]:
    """Wait for children; where one is killed, the others follow, as under a launcher.

    Returns:
        Their exit codes, negative for signals.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run_ranks(world: int, work: Callable[[int], None], logs: Path) -> list[int]:
    """Do ``work(rank)`` on ranks of one process group; returns their exit codes."""
    port = free_port()

    def rank_of(rank: int) -> Callable[[], None]:
        def start() -> None:
            import deepspeed
            import torch

            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in places.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            torch.set_num_threads(1)
            deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
            work(rank)
            torch.distributed.barrier()

        return start

    return join([fork(rank_of(rank), logs / f"rank{rank}.log") for rank in range(world)])


def logs_of(folder: Path) -> str:
    """The ends of all logs."""
    return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("*.log")))
