# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of AdamW, Adafactor, CAME and Adapprox, in pairs of equal seeds.

    python examples/paper/losses.py [--steps 600] [--seeds 5] [--only NAME...] [--reuse]

A pair shares initialisation and data order. Learning rates are swept alike for all on the first
seed; each optimizer then runs at its best on every seed. Differences come with the 95 % interval of
their mean over seeds. Adafactor is transformers', as the paper runs it; CAME needs
pytorch_optimizer (pip install --no-deps). Writes results/losses.json; takes a minute or two
a run. With --only the other optimizers' rows are those in that file, with --reuse all runs that it
holds are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from small_gpt import load_bytes, train
from transformers import Adafactor

from adapprox_ds import Adapprox, MicroAdam

LEARNING_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2)
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
DECAY = 0.1
#: Optimizer, learning rate, seed, steps.
Task = tuple[str, float, int, int]
RANK = {"rank_min": 8, "rank_init": 8, "rank_max": 8}


def adafactor(params: list, lr: float, beta1: float = 0.9) -> torch.optim.Optimizer:
    """transformers', with the learning rate that it is given, as the others."""
    return Adafactor(
        [p for _, p in params],
        lr=lr,
        beta1=beta1 or None,
        weight_decay=DECAY,
        scale_parameter=False,
        relative_step=False,
    )


def came(params: list, lr: float, beta1: float = 0.9) -> torch.optim.Optimizer:
    """pytorch_optimizer's."""
    build = import_module("pytorch_optimizer").CAME
    plain = [p for _, p in params]
    built: torch.optim.Optimizer = build(
        plain, lr=lr, betas=(beta1, 0.999, 0.9999), weight_decay=DECAY
    )
    return built


def installed(names: Sequence[str]) -> list[str]:
    """Those of the optimizers that can be run; says which cannot."""
    try:
        import_module("pytorch_optimizer")
    except ImportError:
        print("CAME: not run, pytorch_optimizer is not installed")
        return [name for name in names if name != "CAME"]
    return list(names)


OPTIMIZERS: dict[str, Callable[[list, float], torch.optim.Optimizer]] = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=DECAY),
    "Adafactor": adafactor,
    "CAME": came,
    "Adapprox, paper, k = 8": lambda params, lr: Adapprox(
        params, lr, weight_decay=DECAY, preset="paper", **RANK
    ),
    "Adapprox, default, k = 8": lambda params, lr: Adapprox(params, lr, weight_decay=DECAY, **RANK),
    "Adapprox, k = 8, nesterov = False": lambda params, lr: Adapprox(
        params, lr, weight_decay=DECAY, nesterov=False, **RANK
    ),
    # Of the same bytes.
    "MicroAdam": lambda params, lr: MicroAdam(params, lr, weight_decay=DECAY),
    "MicroAdam, window = 2, density = 0.05": lambda params, lr: MicroAdam(
        params, lr, weight_decay=DECAY, window=2, density=0.05
    ),
}


def run(task: Task) -> float:
    """One training run; a process of its own thread."""
    name, lr, seed, steps = task
    torch.set_num_threads(1)
    return train(load_bytes(), OPTIMIZERS[name], lr=lr, seed=seed, steps=steps)


def runs_of(rows: dict[str, Any], steps: int) -> dict[Task, float]:
    """The runs that a result file holds."""
    found = {}
    for name, row in rows.items():
        found |= {(name, float(lr), 0, steps): loss for lr, loss in row["sweep"].items()}
        found |= {(name, row["lr"], s, steps): loss for s, loss in enumerate(row["losses"])}
    return found


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of the paired differences and half the width of its 95 % interval."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(pairs), T_95[len(pairs) - 1] * stdev(pairs) / math.sqrt(len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--reuse", action="store_true")
    options = parser.parse_args()
    names = installed(options.only)
    result = Path(__file__).parent / "results" / "losses.json"
    rows: dict[str, Any] = {}
    if options.reuse or set(names) != set(OPTIMIZERS):
        known = json.loads(result.read_text())
        if known["steps"] != options.steps:
            raise SystemExit(f"{result} has runs of {known['steps']} steps; allowed: as many")
        rows = known["optimizers"]
    found = runs_of(rows, options.steps) if options.reuse else {}
    with ProcessPoolExecutor(options.processes) as pool:

        def add(tasks: Iterable[Task]) -> None:
            new = [task for task in tasks if task not in found]
            found.update(zip(new, pool.map(run, new), strict=True))

        add((n, lr, 0, options.steps) for n in names for lr in LEARNING_RATES)
        best = {
            name: min(LEARNING_RATES, key=lambda lr: found[(name, lr, 0, options.steps)])
            for name in names
        }
        add((n, best[n], s, options.steps) for n in names for s in range(options.seeds))
    for name in names:
        losses = [found[(name, best[name], s, options.steps)] for s in range(options.seeds)]
        swept = {str(lr): found[(name, lr, 0, options.steps)] for lr in LEARNING_RATES}
        rows[name] = {"lr": best[name], "losses": losses, "sweep": swept}
    print("| held-out nats a byte | lr | mean | minus AdamW |")
    print("|---|---|---|---|")
    rows = {name: rows[name] for name in OPTIMIZERS if name in rows}
    for name, row in rows.items():
        d, half = difference(row["losses"], rows["AdamW"]["losses"])
        row |= {"minus_adamw": d, "interval_95": half}
        print(f"| {name} | {row['lr']} | {mean(row['losses']):.4f} | {d:+.4f} ± {half:.4f} |")
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"steps": options.steps, "optimizers": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
