# SPDX-License-Identifier: Apache-2.0
"""Sizes and times of a GPT-2 124M checkpoint: AdamW's dense second moment against factors.

    DS_ACCELERATOR=cpu python examples/paper/checkpoint_size.py

One process under ZeRO-1 in bf16. The state is allocated and filled with random numbers instead of
trained: neither a file's size nor its time depends on the values. Prints a table and writes
results/checkpoint_size.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = (1, 8, 64)
RESULT = Path(__file__).parent / "results" / "checkpoint_size.json"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def mib(*paths: Path) -> float:
    """MiB on disk of files and folders."""
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*"))]
    return sum(f.stat().st_size for f in files if f.is_file()) / 2**20


def build(rank: int | None, layers: int, universal: bool) -> Any:
    """An engine whose state is that of a step; ``rank`` None: AdamW."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import adapprox_ds

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal and rank is None},
    }
    parameters = list(model.parameters())
    if rank is None:
        optimizer = torch.optim.AdamW(parameters, foreach=False)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    params = {"rank_init": rank, "rank_max": rank}
    config["optimizer"] = {"type": "Adapprox", "params": params}
    return adapprox_ds.initialize(model=model, model_parameters=parameters, config=config)[0]


def fill(engine: Any, rank: int | None) -> None:
    """Random moments."""
    import torch

    optimizer = engine.optimizer.optimizer
    if rank is not None:
        optimizer.init_state()
        for state in optimizer.state.values():
            store = state["exp_avg_sq"].store
            factors = [t for b in store.factors for t in (b.q, b.u)]
            for t in (state["exp_avg"], store.dense, *factors):
                t.uniform_()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {key: torch.rand_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p].update({"step": torch.tensor(1.0), **moments})


def measure(rank: int | None, layers: int, folder: Path, workers: int) -> dict[str, float]:
    """Save, convert and load one optimizer's checkpoint."""
    from adapprox_ds.checkpoint import convert, load_universal

    engine = build(rank, layers, universal=False)
    fill(engine, rank)
    row = {"save s": timed(lambda: engine.save_checkpoint(str(folder), tag="s"))}
    row["saved MiB"] = mib(*(folder / "s").glob("*_optim_states.pt"))
    engine.destroy()
    output = folder / "s_universal"
    row["convert s"] = timed(lambda: convert(folder / "s", output, workers=workers))
    row["universal MiB"] = mib(output / "zero")
    row["2nd moment MiB"] = mib(*(output / "zero").glob("*/exp_avg_sq.pt"))
    engine = build(rank, layers, universal=True)
    if rank is None:
        row["load s"] = timed(lambda: engine.load_checkpoint(str(folder)))
    else:
        row["load s"] = timed(lambda: load_universal(engine, folder))
    engine.destroy()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2; 12 are 124M")
    parser.add_argument("--workers", type=int, default=2, help="processes of the converter")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    rows = {}
    for rank in (None, *options.ranks):
        with tempfile.TemporaryDirectory() as folder:
            name = "AdamW" if rank is None else f"Adapprox, k = {rank}"
            rows[name] = measure(rank, options.layers, Path(folder), options.workers)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps({"layers": options.layers, "rows": rows}, indent=1) + "\n")
    heads = list(rows["AdamW"])
    print("| | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[head]:.1f}" for head in heads) + " |")


if __name__ == "__main__":
    main()
