# SPDX-License-Identifier: Apache-2.0
"""The paper's Figure 5: training with and without a first moment (beta_1 = 0.9 and 0).

    python examples/paper/figure5_first_moment.py [--steps 200] [--seeds 2] [--only NAME...]

The small GPT with AdamW, Adafactor (transformers', since torch's has no first moment), CAME (where
pytorch_optimizer is installed) and Adapprox, the paper's and the default, k = 8. Each is run with
and without at its best of the same learning rates, chosen on the first seed; a pair shares
initialisation and data order. The paper leaves CAME without a first moment out: its confidence is
the distance of an update from the first moment, which is then 0, and it divides by the root of it.
Here it is run all the same; "diverged" is a held-out loss above that of guessing bytes, ln 256. The
paper trains GPT-2 for 100,000 steps. Prints a table, writes results/figure5_first_moment.json and a
picture of the training losses.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_step import fixed
from losses import T_95, difference
from peers import DECAY, adafactor, came, installed
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox

#: Named parameters, learning rate and beta_1 -> optimizer.
Builder = Callable[[list[Any], float, float], torch.optim.Optimizer]

RATES = (1e-3, 4e-3)
BETAS = {"with": 0.9, "without": 0.0}
#: Steps over which the picture's curves are averaged.
SMOOTHING = 10
DIVERGED = math.log(256)


OPTIMIZERS: dict[str, Builder] = {
    "AdamW": lambda params, lr, beta1: torch.optim.AdamW(
        params, lr, betas=(beta1, 0.999), weight_decay=DECAY
    ),
    "Adafactor": adafactor,
    "CAME": came,
    "Adapprox, paper": lambda params, lr, beta1: Adapprox(
        params, lr, betas=(beta1, 0.999), weight_decay=DECAY, **fixed(8, preset="paper")
    ),
    "Adapprox": lambda params, lr, beta1: Adapprox(
        params, lr, betas=(beta1, 0.999), weight_decay=DECAY, **fixed(8)
    ),
}
#: Optimizer, "with" or "without", learning rate, seed, steps.
Task = tuple[str, str, float, int, int]


def run(task: Task) -> tuple[float, list[float]]:
    """One training run: held-out loss, and the training loss of every step."""
    name, kind, lr, seed, steps = task
    torch.set_num_threads(1)
    curve: list[float] = []
    loss = train(
        load_bytes(),
        lambda params, rate: OPTIMIZERS[name](params, rate, BETAS[kind]),
        lr=lr,
        seed=seed,
        steps=steps,
        record=curve.append,
    )
    return loss, curve


def as_number(loss: float) -> float:
    """NaN as infinity, which can be compared."""
    return math.inf if math.isnan(loss) else loss


def smooth(curve: list[float]) -> list[float]:
    """The mean over the last ``SMOOTHING`` steps at each step."""
    return [mean(curve[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(curve))]


def draw(rows: dict[str, Any], path: Path) -> None:
    """A panel for each optimizer."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(3.6 * columns, 3.1 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    for axes, (name, row) in zip(grid.flat, rows.items(), strict=False):
        for kind in BETAS:
            label = f"{kind}, lr {row[kind]['lr']}"
            if row[kind]["diverged"]:
                axes.plot([], [], label=f"{label}: diverged")
                continue
            curve = smooth(row[kind]["training_loss"])
            axes.plot(range(1, len(curve) + 1), curve, label=label)
        axes.set(title=name)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        axes.legend(title="first moment")
    grid[0, 0].set_ylim(top=DIVERGED)  # of all panels, whose axes are shared
    figure.supxlabel("step")
    figure.supylabel(f"training loss, nats a byte (mean of {SMOOTHING} steps)")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, choices=[n + 1 for n in T_95])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    pairs = [(name, kind) for name in installed(options.only) for kind in BETAS]
    with ProcessPoolExecutor(options.processes) as pool:
        sweep = [(*pair, lr, 0, options.steps) for pair in pairs for lr in options.rates]
        found = dict(zip(sweep, pool.map(run, sweep), strict=True))
        best: dict[tuple[str, str], float] = {}
        for pair in pairs:
            tried = [task for task in sweep if task[:2] == pair]
            best[pair] = min(tried, key=lambda task: as_number(found[task][0]))[2]
        rest = [(*p, best[p], s, options.steps) for p in pairs for s in range(1, options.seeds)]
        found |= dict(zip(rest, pool.map(run, rest), strict=True))
    rows: dict[str, Any] = {name: {} for name, _ in pairs}
    for name, kind in pairs:
        lr = best[(name, kind)]
        runs = [found[(name, kind, lr, s, options.steps)] for s in range(options.seeds)]
        diverged = any(as_number(loss) > DIVERGED for loss, _ in runs)
        curves = zip(*(curve for _, curve in runs), strict=True)
        rows[name][kind] = {
            "lr": lr,
            "diverged": diverged,
            "losses": None if diverged else [loss for loss, _ in runs],
            "training_loss": None if diverged else [round(mean(step), 4) for step in curves],
        }
    print("| held-out nats a byte | with | without | without minus with |\n|---|---|---|---|")
    for name, row in rows.items():
        cells = ["diverged" if r["diverged"] else f"{mean(r['losses']):.3f}" for r in row.values()]
        gap = ""
        if "diverged" not in cells:
            d, half = difference(row["without"]["losses"], row["with"]["losses"])
            row |= {"without_minus_with": d, "interval_95": half}
            gap = f"{d:+.3f} ± {half:.3f}"
        print(f"| {name} | " + " | ".join(cells) + f" | {gap} |")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "figure5_first_moment.json"
    path.write_text(json.dumps({"steps": options.steps, "optimizers": rows}) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
