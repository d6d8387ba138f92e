# SPDX-License-Identifier: Apache-2.0
"""Runs many test cases in one group of processes: importing DeepSpeed takes seconds a process.

``run_world(2, "tests.cases_stages", ids)`` starts two ranks; each runs every case of the module's
``CASES`` (id -> callable taking a scratch folder) in order and records its outcome.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

#: A collective that not all ranks enter fails a case after this long instead of hanging it.
COLLECTIVE_TIMEOUT_S = 60
WORLD_TIMEOUT_S = 900


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


def _report(scratch: Path, case: str, rank: int) -> str | None:
    """What a rank recorded for a case: empty when it passed; None when it did not get there."""
    path = scratch / f"{case}.rank{rank}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _start(world: int, module: str, cases: list[str], scratch: Path) -> list[str]:
    """Start the ranks, wait for them, return the end of each one's log."""
    port = free_port()
    logs, processes = [], []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.world", module, str(scratch), *cases]
        log = tempfile.TemporaryFile("w+")
        logs.append(log)
        root = Path(__file__).resolve().parent.parent
        processes.append(
            subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=root)
        )
    try:
        for process in processes:
            process.wait(timeout=WORLD_TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    ends = []
    for log in logs:
        log.seek(0)
        ends.append(f"no outcome; the log ends:\n{log.read()[-4000:]}")
    return ends


def main() -> None:
    """One rank: run the cases, write each outcome as soon as it is known."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()

    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S), verbose=False
    )
    # DeepSpeed refuses fp16 on CPU, where the arithmetic works all the same.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    table = importlib.import_module(options.module).CASES
    rank = torch.distributed.get_rank()
    for case in options.cases:
        folder = options.scratch / case
        folder.mkdir(parents=True, exist_ok=True)
        try:
            table[case](folder)
            text = ""
        except BaseException:  # pytest's failures are no Exceptions
            text = traceback.format_exc()
        (options.scratch / f"{case}.rank{rank}.json").write_text(json.dumps(text))
        if text:
            # The others may wait in a collective that this rank never enters: end the world.
            os._exit(1)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
