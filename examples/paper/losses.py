# SPDX-License-Identifier: Apache-2.0
"""Held-out loss against the learning rate of Adapprox and its peers, in pairs of equal seeds.

    python examples/paper/losses.py [--corpus shakespeare] [--steps 400] [--only NAME...] [--reuse]

A small GPT on bytes. A pair shares initialisation and data order. Every optimizer runs at every
rate on the first seed, and on the other seeds at the rates that came within 3 % of its best. Its
basin is the rates whose mean loss is within 1 % of its lowest; it diverges at those higher rates at
which a run ended in NaN or 20 % above it. NAdamW (peers.py) has Adapprox's look-ahead and a dense
second moment, so that the difference to it is what the low rank costs: it is measured at NAdamW's
best rate with more seeds (--pairs), and given with the 95 % interval of its mean, as that to AdamW.
So is what guidance gains, at the best rate of the default.

Adafactor is transformers', as the paper runs it; CAME, SOAP, GaLore and Lion need
pytorch_optimizer, AdamW8bit torchao, Adam-mini adam-mini (pip install --no-deps). Writes
results/losses.json, or losses_shakespeare.json, and the picture beside it, after every optimizer;
half a minute a run. With --only the other optimizers' rows are those in that file, with --reuse all
runs that it holds are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import torch
from peers import DECAY, PEERS, installed
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox, MicroAdam

mpl.use("Agg")
import matplotlib.pyplot as plt

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2)
#: What a rate is multiplied by for optimizers whose updates are of another size.
SCALE = {"Lion": 0.1, "CAME": 0.1, "GaLore": 2.0}
#: Of its best, how far a rate may be behind on the first seed to be run on the others.
NEAR = 0.03
#: Of its best, how far behind a rate is still in the basin, and beyond which a run has diverged.
BASIN, DIVERGED = 0.01, 0.2
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
T_95 |= {
    10: 2.23,
    11: 2.20,
    12: 2.18,
    13: 2.16,
    14: 2.14,
    15: 2.13,
    19: 2.09,
    23: 2.07,
    29: 2.05,
    39: 2.02,
}
RANK = {"rank_min": 8, "rank_init": 8, "rank_max": 8}
CONTROL, DEFAULT = "NAdamW", "Adapprox, default, k = 8"
GUIDED = "Adapprox, k = 8, guidance = cosine"
#: Differences that have more seeds, at the best rate of the second.
PAIRS = {"cost_of_low_rank": (DEFAULT, CONTROL), "gain_of_guidance": (GUIDED, DEFAULT)}
#: Optimizer, learning rate, seed.
Task = tuple[str, float, int]


def ours(**knobs: Any) -> Callable[[list, float], torch.optim.Optimizer]:
    """Adapprox at rank 8."""
    return lambda params, lr: Adapprox(params, lr, weight_decay=DECAY, **{**RANK, **knobs})


def micro(**knobs: Any) -> Callable[[list, float], torch.optim.Optimizer]:
    """MicroAdam."""
    return lambda params, lr: MicroAdam(params, lr, weight_decay=DECAY, **knobs)


OPTIMIZERS: dict[str, Callable[[list, float], torch.optim.Optimizer]] = {
    **PEERS,
    "Adapprox, paper, k = 8": ours(preset="paper"),
    DEFAULT: ours(),
    "Adapprox, k = 8, int8 first moment": ours(first_moment="int8"),
    "Adapprox, k = 8, nesterov = False": ours(nesterov=False),
    GUIDED: ours(guidance="cosine"),
    # Of the same bytes, without and with a part of the error feedback applied at once.
    "MicroAdam": micro(),
    "MicroAdam, alpha = 0.1": micro(alpha=0.1),
    "MicroAdam, window = 2, density = 0.05": micro(window=2, density=0.05),
    "MicroAdam, window = 2, density = 0.05, alpha = 0.1": micro(window=2, density=0.05, alpha=0.1),
}


def run(task: Task, corpus: str, steps: int) -> float:
    """One training run; a process of its own thread."""
    name, lr, seed = task
    torch.set_num_threads(1)
    return train(load_bytes(corpus), OPTIMIZERS[name], lr=lr, seed=seed, steps=steps)


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean of the paired differences and half the width of its 95 % interval."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(pairs), T_95[len(pairs) - 1] * stdev(pairs) / math.sqrt(len(pairs))


def bad(loss: float, best: float) -> bool:
    """Whether a run has diverged, by the loss of the best."""
    return not loss <= (1 + DIVERGED) * best


def row_of(runs: dict[float, list[float]], seeds: int) -> dict[str, Any]:
    """What is said of an optimizer.

    Args:
        runs: by learning rate the losses of seeds 0, 1...; a rate far from the best has one.
        seeds: that a mean is taken over.
    """
    means = {lr: mean(losses[:seeds]) for lr, losses in runs.items() if len(losses) >= seeds}
    lr = min(means, key=lambda rate: means[rate])
    basin = [rate for rate, loss in means.items() if loss <= (1 + BASIN) * means[lr]]
    return {
        "lr": lr,
        "losses": runs[lr][:seeds],
        "basin": [min(basin), max(basin)],
        "diverged": [
            rate for rate, x in runs.items() if rate > lr and any(bad(v, means[lr]) for v in x)
        ],
        # JSON has no NaN.
        "runs": {str(rate): [v if v == v else None for v in x] for rate, x in runs.items()},
    }


def runs_of(rows: dict[str, Any]) -> dict[Task, float]:
    """The runs that a result file holds."""
    return {
        (name, float(lr), seed): math.nan if loss is None else loss
        for name, row in rows.items()
        for lr, losses in row["runs"].items()
        for seed, loss in enumerate(losses)
    }


def draw(rows: dict[str, Any], path: Path) -> None:
    """Basins: the mean loss by learning rate."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, row in rows.items():
        rates = [(float(lr) / SCALE.get(name, 1.0), x) for lr, x in row["runs"].items()]
        points = [(lr, mean(v for v in x if v is not None)) for lr, x in rates if None not in x]
        width = 2.5 if name == DEFAULT else 1.0
        label = f"{name}, rates / {SCALE[name]:g}" if name in SCALE else name
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=width, label=label)
    best = [mean(row["losses"]) for row in rows.values()]
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out nats a byte")
    axes.set_ylim(min(best) - 0.01, 1.1 * max(best))
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=("messages", "shakespeare"), default="messages")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--pairs", type=int, default=16, help="seeds of the differences that have more"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--reuse", action="store_true")
    options = parser.parse_args()
    names = installed(options.only)
    stem = "losses" if options.corpus == "messages" else f"losses_{options.corpus}"
    result = Path(__file__).parent / "results" / f"{stem}.json"
    data: dict[str, Any] = {"optimizers": {}}
    if options.reuse or set(names) != set(OPTIMIZERS):
        data = json.loads(result.read_text()) if result.exists() else data
        if data.setdefault("steps", options.steps) != options.steps:
            raise SystemExit(f"{result} has runs of {data['steps']} steps; allowed: as many")
    rows: dict[str, Any] = data["optimizers"]
    found = runs_of(rows if options.reuse else {n: r for n, r in rows.items() if n not in names})

    def write() -> None:
        known = {name: rows[name] for name in OPTIMIZERS if name in rows}
        data.update(corpus=options.corpus, steps=options.steps, seeds=options.seeds)
        data["optimizers"] = known
        for name, row in known.items():
            for other, key in (("AdamW", "minus_adamw"), (CONTROL, "minus_nadamw")):
                if other in known and other != name:
                    row[key] = difference(row["losses"], known[other]["losses"])
        result.write_text(json.dumps(data, indent=1) + "\n")
        draw(known, result.with_suffix(".png"))

    with ProcessPoolExecutor(options.processes) as pool:

        def add(tasks: Iterable[Task]) -> None:
            new = [task for task in tasks if task not in found]
            for task, loss in zip(
                new,
                pool.map(run, new, *([x] * len(new) for x in (options.corpus, options.steps))),
                strict=True,
            ):
                found[task] = loss
                print(*task, f"{loss:.4f}", flush=True)

        def row(name: str) -> None:
            runs: dict[float, list[float]] = {}
            for lr in [lr * SCALE.get(name, 1.0) for lr in LEARNING_RATES]:
                while (task := (name, lr, len(runs.setdefault(lr, [])))) in found:
                    runs[lr].append(found[task])
            rows[name] = row_of(runs, options.seeds)

        for name in names:
            rates = [lr * SCALE.get(name, 1.0) for lr in LEARNING_RATES]
            add((name, lr, 0) for lr in rates)
            first = {lr: found[name, lr, 0] for lr in rates}
            best = min(loss for loss in first.values() if loss == loss)
            near = [lr for lr, loss in first.items() if loss <= (1 + NEAR) * best]
            add((name, lr, seed) for seed in range(1, options.seeds) for lr in near)
            row(name)
            write()
        for key, pair in PAIRS.items():
            if not set(pair) <= set(names):
                continue
            lr = rows[pair[1]]["lr"]
            add((n, lr, seed) for seed in range(options.pairs) for n in pair)
            for name in pair:
                row(name)
            of = [[found[n, lr, s] for s in range(options.pairs)] for n in pair]
            data[key] = {"lr": lr, "seeds": options.pairs, "difference": difference(*of)}
            write()
    print("| optimizer | best rate | nats a byte | basin | minus AdamW | minus NAdamW |")
    print("|---|---|---|---|---|---|")
    for name, row_ in data["optimizers"].items():
        gaps = [row_.get(key) for key in ("minus_adamw", "minus_nadamw")]
        shown = ["" if gap is None else f"{gap[0]:+.4f} ± {gap[1]:.4f}" for gap in gaps]
        basin = "{:g} to {:g}".format(*row_["basin"])
        cells = [name, f"{row_['lr']:g}", f"{mean(row_['losses']):.4f}", basin, *shown]
        print(f"| {' | '.join(cells)} |")
    for key, (first, second) in PAIRS.items():
        if known := data.get(key):
            gap, half = known["difference"]
            print(
                f"{first} - {second} at {known['lr']:g}, {known['seeds']} seeds: "
                f"{gap:+.4f} ± {half:.4f}"
            )


if __name__ == "__main__":
    main()
