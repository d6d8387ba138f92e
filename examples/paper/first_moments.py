# SPDX-License-Identifier: Apache-2.0
"""Held-out loss by what the first moment and the weights are kept in, in pairs of equal seeds.

    python examples/paper/first_moments.py [--corpus shakespeare] [--lr 0.004] [--only NAME...]

A pair shares initialisation and data order; rank 8 throughout. Where weights are in bf16 so are
gradients, as with DeepSpeed's bf16_master_weights_and_grads; the model always computes in fp32.
Differences come with the 95 % interval of their mean over seeds. Bytes are of weights, gradients
and state. At --lr 0.00025 updates are about as small as a last place of bf16, as they are in
fine-tuning, which shows what rounding to nearest loses. Writes results/first_moments.json (with the
corpus and the rate in its name where they are not the default) as it goes, and with --reuse does
not repeat what is there; takes half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from losses import RANK, difference
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox

#: Name -> dtype of weights and gradients, how they are rounded, and the first moment.
KINDS: dict[str, tuple[torch.dtype, str, str]] = {
    "fp32 weights, fp32": (torch.float32, "stochastic", "fp32"),
    "fp32 weights, bf16": (torch.float32, "stochastic", "bf16"),
    "fp32 weights, int8": (torch.float32, "stochastic", "int8"),
    "fp32 weights, int4": (torch.float32, "stochastic", "int4"),
    "bf16 at random, int8": (torch.bfloat16, "stochastic", "int8"),
    "bf16 at random, int4": (torch.bfloat16, "stochastic", "int4"),
    "bf16 compensated, int8": (torch.bfloat16, "compensated", "int8"),
    "bf16 compensated, int4": (torch.bfloat16, "compensated", "int4"),
    "bf16 to nearest, int8": (torch.bfloat16, "nearest", "int8"),
}
DEFAULT_LR = 4e-3


def result_of(corpus: str, lr: float) -> Path:
    """The file of a corpus and a learning rate."""
    name = "first_moments" if corpus == "messages" else f"first_moments_{corpus}"
    name += "" if lr == DEFAULT_LR else f"_{lr:g}"
    return Path(__file__).parent / "results" / f"{name}.json"


def run(task: tuple[str, str, float, int, int]) -> tuple[float, float]:
    """One training run: held-out loss, and bytes of weights, gradients and state a parameter."""
    name, corpus, lr, seed, steps = task
    dtype, rounding, kind = KINDS[name]
    torch.set_num_threads(1)
    built: list[Adapprox] = []
    knobs = {"weight_rounding": rounding, "first_moment": kind, "weight_decay": 0.1, **RANK}
    loss = train(
        load_bytes(corpus),
        lambda params, rate: Adapprox(params, rate, **knobs),
        lr=lr,
        seed=seed,
        steps=steps,
        watch=lambda optimizer: built.append(optimizer),  # type: ignore[arg-type]
        masters=dtype,
    )
    held = [p for group in built[0].param_groups for p in group["params"]]
    elements = sum(p.numel() for p in held)
    return loss, 2 * dtype.itemsize + built[0].metrics().state_bytes / elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=("messages", "shakespeare"), default="messages")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=DEFAULT_LR)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--reuse", action="store_true", help="take runs from the result file")
    options = parser.parse_args()
    facts = {"steps": options.steps, "lr": options.lr}
    result = result_of(options.corpus, options.lr)
    rows: dict[str, Any] = {n: {"losses": [], "bytes_a_parameter": 0.0} for n in options.only}
    if options.reuse and result.exists():
        before = json.loads(result.read_text())
        if {key: before[key] for key in facts} == facts:
            rows |= {name: row for name, row in before["kinds"].items() if name in rows}
    tasks = [
        (name, options.corpus, options.lr, seed, options.steps)
        for seed in range(options.seeds)
        for name in rows
        if len(rows[name]["losses"]) <= seed
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        for (name, *_), (loss, size) in zip(tasks, pool.map(run, tasks), strict=True):
            rows[name]["losses"].append(loss)
            rows[name]["bytes_a_parameter"] = size
            result.write_text(json.dumps({**facts, "kinds": rows}, indent=1) + "\n")
    print("| weights, first moment | nats a byte | minus the first row | bytes a parameter |")
    print("|---|---|---|---|")
    full = rows[next(iter(rows))]["losses"]
    for name, row in rows.items():
        d, half = difference(row["losses"], full[: len(row["losses"])])
        row |= {"minus_fp32": d, "interval_95": half}
        size = row["bytes_a_parameter"]
        print(f"| {name} | {mean(row['losses']):.4f} | {d:+.4f} ± {half:.4f} | {size:.2f} |")
    result.write_text(json.dumps({**facts, "kinds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
