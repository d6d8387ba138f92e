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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_world(world: int, module: str, cases: list[str], scratch: Path) -> dict[str, str]:
    """Run cases on ``world`` ranks.

    Returns:
        For each case an empty string, or what failed and where.
    """
    port = _free_port()
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
        processes.append(
            subprocess.Popen(
                command,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).resolve().parent.parent,
            )
        )
    try:
        for process in processes:
            process.wait(timeout=WORLD_TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    outcome: dict[str, str] = {}
    for case in cases:
        failures = []
        for rank in range(world):
            result = scratch / f"{case}.rank{rank}.json"
            if not result.exists():
                logs[rank].seek(0)
                tail = logs[rank].read()[-4000:]
                failures.append(f"rank {rank} did not get to {case}; its log ends:\n{tail}")
            elif text := json.loads(result.read_text()):
                failures.append(f"rank {rank}:\n{text}")
        outcome[case] = "\n".join(failures)
    return outcome


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
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S), verbose=False)
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
        except Exception:
            text = traceback.format_exc()
        (options.scratch / f"{case}.rank{rank}.json").write_text(json.dumps(text))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
