# SPDX-License-Identifier: Apache-2.0
"""Held-out loss with the first moment in full, in bf16 and in 8-bit codes, in pairs of equal seeds.

    python examples/paper/first_moments.py [--steps 600] [--seeds 3] [--lr 0.004]

A pair shares initialisation and data order; rank 8 throughout. Differences come with the 95 %
interval of their mean over seeds. Writes results/first_moments.json; takes ten minutes on one core.
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

KINDS = ("fp32", "bf16", "int8")


def run(task: tuple[str, float, int, int]) -> tuple[float, float]:
    """One training run: held-out loss, and bytes of state a parameter."""
    kind, lr, seed, steps = task
    torch.set_num_threads(1)
    built: list[Adapprox] = []
    loss = train(
        load_bytes(),
        lambda params, rate: Adapprox(params, rate, weight_decay=0.1, first_moment=kind, **RANK),
        lr=lr,
        seed=seed,
        steps=steps,
        watch=lambda optimizer: built.append(optimizer),  # type: ignore[arg-type]
    )
    metrics = built[0].metrics()
    return loss, 8 * metrics.state_bytes / metrics.adamw_state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    tasks = [(k, options.lr, s, options.steps) for k in KINDS for s in range(options.seeds)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(tasks, pool.map(run, tasks), strict=True))
    rows: dict[str, Any] = {}
    print("| first moment | nats a byte | minus fp32 | bytes of state a parameter |")
    print("|---|---|---|---|")
    for kind in KINDS:
        runs = [found[(kind, options.lr, s, options.steps)] for s in range(options.seeds)]
        losses = [loss for loss, _ in runs]
        full = losses if kind == "fp32" else rows["fp32"]["losses"]
        d, half = difference(losses, full)
        rows[kind] = {
            "losses": losses,
            "minus_fp32": d,
            "interval_95": half,
            "bytes_a_parameter": runs[0][1],
        }
        print(f"| {kind} | {mean(losses):.4f} | {d:+.4f} ± {half:.4f} | {runs[0][1]:.2f} |")
    result = Path(__file__).parent / "results" / "first_moments.json"
    facts = {"steps": options.steps, "lr": options.lr}
    result.write_text(json.dumps({**facts, "kinds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
