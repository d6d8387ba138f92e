# SPDX-License-Identifier: Apache-2.0
"""Runs many test cases in one group of processes, forked off one that has imported DeepSpeed.

``run_world(2, "tests.zero.cases_stages", ids)`` starts two ranks; each runs every case of the
module's ``CASES`` (id -> callable taking a scratch folder) in order and records its outcome.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import ROOT

#: Ranks, module, cases.
Started = tuple[int, str, list[str]]
#: A collective that not all ranks enter fails a case after this long instead of hanging it.
COLLECTIVE_TIMEOUT_S = 60
WORLD_TIMEOUT_S = 900


def release_of(package: str) -> tuple[int, ...]:
    """Of "0.19.8+unknown": (0, 19, 8)."""
    return tuple(int(n) for n in version(package).partition("+")[0].split("."))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_world(world: int, module: str, cases: list[str], scratch: Path) -> dict[str, str]:
    """Run cases on ``world`` ranks; where one fails, the rest goes on in new processes.

    Returns:
        For each case an empty string, or what failed and where.
    """
    outcome: dict[str, str] = {}
    while left := [case for case in cases if case not in outcome]:
        logs = _start(world, module, left, scratch)
        reports = {case: [_report(scratch, case, rank) for rank in range(world)] for case in left}
        failed = next((c for c in left if any(text != "" for text in reports[c])), None)
        for case in left:
            if case == failed:
                outcome[case] = "\n".join(
                    f"rank {rank}:\n{text if text is not None else logs[rank]}"
                    for rank, text in enumerate(reports[case])
                )
                break
            outcome[case] = ""
    return outcome


def run_worlds(worlds: Sequence[Started], scratch: Path) -> dict[str, str]:
    """Run several worlds, two at once, as ranks wait for each other half of the time.

    Args:
        worlds: the arguments of :func:`run_world`, of cases that do not need each other.
        scratch: for all of them.
    """
    outcome: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda started: run_world(*started, scratch), worlds):
            outcome |= found
    return outcome


def _report(scratch: Path, case: str, rank: int) -> str | None:
    """What a rank recorded for a case: empty when it passed; None when it did not get there."""
    path = scratch / f"{case}.rank{rank}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _start(world: int, module: str, cases: list[str], scratch: Path) -> list[str]:
    """Start the ranks, wait for them, return the end of each one's log."""
    shared = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    log = f"{module}.{world}.{cases[0]}"
    logs = [scratch / f"{log}.rank{rank}.log" for rank in range(world)]
    works = []
    for rank, path in enumerate(logs):
        path.touch()
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        works.append(partial(_run_rank, environment, module, cases, path))
    fork(works)
    return [f"no outcome; the log ends:\n{log.read_text()[-4000:]}" for log in logs]


def fork(works: Sequence[Callable[[], None]]) -> list[int | None]:
    """Do each in a process of its own, forked off one that has imported DeepSpeed.

    Returns:
        Their exit codes; None of one that did not end in time.
    """
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.preloaded"])
    processes = [server.Process(target=work) for work in works]
    for process in processes:
        process.start()
    deadline = time.monotonic() + WORLD_TIMEOUT_S
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _run_rank(environment: dict[str, str], module: str, cases: list[str], log: Path) -> None:
    """One rank: run the cases, write each outcome as soon as it is known."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    import deepspeed
    import torch

    torch.set_num_threads(1)
    if release_of("deepspeed") < (0, 19, 0):
        # It writes into views of parameters outside no_grad, at stages 1 and 2 on several ranks,
        # which torch 2.13 refuses of any optimizer; the torch of its day did not.
        deepspeed.comm.all_gather_into_tensor = torch.no_grad()(
            deepspeed.comm.all_gather_into_tensor
        )
    deepspeed.init_distributed(
        "gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S), verbose=False
    )
    # DeepSpeed refuses fp16 on CPU, where the arithmetic works all the same.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    table = importlib.import_module(module).CASES
    # See preloaded.py.
    gc.freeze()
    rank = torch.distributed.get_rank()
    for case in cases:
        folder = log.parent / case
        folder.mkdir(parents=True, exist_ok=True)
        try:
            table[case](folder)
            text = ""
        except BaseException:  # pytest's failures are no Exceptions
            text = traceback.format_exc()
        (log.parent / f"{case}.rank{rank}.json").write_text(json.dumps(text))
        if text:
            # The others may wait in a collective that this rank never enters: end the world.
            os._exit(1)
    torch.distributed.barrier()
