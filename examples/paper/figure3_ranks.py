# SPDX-License-Identifier: Apache-2.0
"""The paper's Figure 3: ranks over training, by matrix.

    python examples/paper/figure3_ranks.py [--steps 600] [--rank-max 32] [--lr 0.004]

Trains the small GPT with the paper's Algorithm 2 (reflection from k_0 = k_max), with the default
step under the same rule, and with expansion from rank 1, all at xi_thresh = 1e-3. The paper trains
GPT-2 117M for 100,000 steps with k_max = 256 and reports a mean rank of 1.4 after the first 1,000.
Prints a table, writes results/figure3_ranks.json and a picture.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox

METHODS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "default step": {},
    "paper, expanding": {"preset": "paper", "rank_policy": "expand"},
}
#: Part of the run, at its end, whose ranks the table averages.
SETTLED = 0.5


def ranks_over_steps(knobs: dict[str, Any], options: argparse.Namespace) -> dict[str, list[int]]:
    """Rank at each step by parameter name."""
    found: dict[str, list[int]] = defaultdict(list)

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        for name, metrics in optimizer.metrics().parameters.items():
            found[name].append(metrics.rank)

    train(
        load_bytes(),
        lambda params, lr: Adapprox(
            params, lr, weight_decay=0.1, rank_max=options.rank_max, **knobs
        ),
        lr=options.lr,
        seed=0,
        steps=options.steps,
        watch=lambda optimizer: optimizer.register_step_post_hook(note) and None,
    )
    return found


def draw(rows: dict[str, Any], path: Path) -> None:
    """A panel for each method: each matrix thin, their mean thick."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(4 * len(rows), 3.6), sharey=True, layout="constrained"
    )
    for axes, (name, row) in zip(panels, rows.items(), strict=True):
        series = list(row["ranks"].values())
        for values in series:
            axes.plot(range(1, len(values) + 1), values, color="C0", alpha=0.25, linewidth=0.8)
        average = [mean(ranks) for ranks in zip(*series, strict=True)]
        axes.plot(range(1, len(average) + 1), average, color="C1", label="mean of all matrices")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].plot([], [], color="C0", alpha=0.5, linewidth=0.8, label="a matrix")
    panels[0].set(ylabel="rank k", ylim=(0, None))
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rank-max", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    print("| ranks | at the first step | mean of the last half | smallest | largest |")
    print("|---|---|---|---|---|")
    for name, knobs in METHODS.items():
        ranks = ranks_over_steps(knobs, options)
        late = [r for values in ranks.values() for r in values[int(SETTLED * len(values)) :]]
        rows[name] = {"ranks": ranks, "mean": mean(late), "least": min(late), "most": max(late)}
        first = mean(values[0] for values in ranks.values())
        print(
            f"| {name} | {first:.1f} | {mean(late):.1f} | {min(late)} | {max(late)} |", flush=True
        )
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "figure3_ranks.json"
    facts = {"steps": options.steps, "rank_max": options.rank_max, "lr": options.lr}
    path.write_text(json.dumps({**facts, "methods": rows}) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
