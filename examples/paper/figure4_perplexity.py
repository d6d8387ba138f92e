# SPDX-License-Identifier: Apache-2.0
"""The paper's Figure 4: held-out perplexity over training, by optimizer.

    python examples/paper/figure4_perplexity.py [--every 50]

One run of the small GPT an optimizer, all of one seed, each at the learning rate that losses.py
found best for it; that script's table, over five seeds, says what differences mean. Perplexity is a
byte's. The paper trains GPT-2 117M and BERT 345M for 100,000 and 200,000 steps. Prints a table,
writes results/figure4_perplexity.json and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from losses import OPTIMIZERS
from peers import installed
from small_gpt import build_model, held_out_loss, load_bytes, train

RESULTS = Path(__file__).parent / "results"
NAMES = ("AdamW", "Adafactor", "CAME", "Adapprox, paper, k = 8", "Adapprox, default, k = 8")


def curve(name: str, lr: float, steps: int, every: int) -> dict[int, float]:
    """Held-out perplexity by step, the last one's among them."""
    data, found, done = load_bytes(), {}, 0
    models: list[Any] = []

    def make_model(seed: int) -> Any:
        models.append(build_model(seed))
        return models[0]

    def record(_: float) -> None:
        nonlocal done
        if done and done % every == 0:
            found[done] = math.exp(held_out_loss(models[0], data.held_out))
        done += 1

    last = train(
        data, OPTIMIZERS[name], lr=lr, seed=0, steps=steps, record=record, make_model=make_model
    )
    return {**found, steps: math.exp(last)}


def draw(rows: dict[str, Any], path: Path) -> None:
    """All in one picture, and the end of it enlarged."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, row in rows.items():
        steps = [int(step) for step in row["perplexity"]]
        values = list(row["perplexity"].values())
        for axes in panels:
            axes.plot(steps, values, label=f"{name}, lr {row['lr']}")
    last = max(steps)
    ends = [v for row in rows.values() for s, v in row["perplexity"].items() if int(s) > last * 0.6]
    panels[1].set(xlim=(0.6 * last, last), ylim=(min(ends) * 0.99, max(ends) * 1.01))
    panels[0].set(yscale="log", title="Held-out perplexity")
    panels[0].set_yticks([6, 8, 10, 12, 16, 20], ["6", "8", "10", "12", "16", "20"])
    panels[0].minorticks_off()
    panels[1].set(title="The end of it")
    for axes in panels:
        axes.set(xlabel="step", ylabel="perplexity a byte")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, help="other than those of losses.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = json.loads((RESULTS / "losses.json").read_text())
    steps = options.steps or known["steps"]
    rows: dict[str, Any] = {}
    print("| optimizer | lr | perplexity a byte |\n|---|---|---|")
    for name in installed(options.only):
        lr = known["optimizers"][name]["lr"]
        rows[name] = {"lr": lr, "perplexity": curve(name, lr, steps, options.every)}
        print(f"| {name} | {lr} | {rows[name]['perplexity'][steps]:.3f} |", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "figure4_perplexity.json"
    path.write_text(json.dumps({"steps": steps, "optimizers": rows}, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
