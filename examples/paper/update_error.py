# SPDX-License-Identifier: Apache-2.0
"""How far each method's update is from the uncompressed one, over a real training run.

    python examples/paper/update_error.py [--rank 8] [--steps 300]

Every run keeps all matrices at one rank, so all hold the same bytes, but for bf16 factors, which
run at that rank and, for the same bytes, at twice it. Each carries a dense shadow of the second
moment (adapprox_ds.report.shadow). Writes results/update_error_k<rank>.json and a
picture of the error over steps, of each parameter and their mean.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox
from adapprox_ds.adapprox import algebra, literal, srsi
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.report.shadow import Shadow

METHODS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "paper, on sqrt(V)": {"preset": "paper"},
    "tracking, unbalanced": {},
    "default (tracking, balanced)": {},
    "default, floor 0.3": {"floor": 0.3},
    "default, bf16 factors, half the bytes": {"factor_dtype": "bf16"},
    "default, bf16 factors, twice the rank": {"factor_dtype": "bf16"},
}
#: What is changed in the package for methods that are no settings of it.
CHANGES = {
    "paper, on sqrt(V)": (
        mock.patch.object(literal, "srsi", lambda v, *rest: srsi.srsi(v.sqrt(), *rest)),
        mock.patch.object(Hyperparameters, "domain", "std"),
    ),
    "tracking, unbalanced": (
        mock.patch.object(algebra, "squared_weights", torch.ones_like),
        mock.patch.dict(os.environ, ADAPPROX_KERNELS="torch"),
    ),
}
LR = 4e-3
#: Steps between comparisons.
EVERY = 10


def draw(rows: dict[str, Any], rank: int, path: Path) -> None:
    """The error of the update over steps."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for color, name in enumerate(name for name in rows if "floor" not in name):
        series = list(rows[name]["update_by_parameter"].values())
        count = min(map(len, series))
        steps = [EVERY * (i + 1) for i in range(count)]
        for values in series:
            axes.plot(steps, values[:count], color=f"C{color}", alpha=0.15, linewidth=0.7)
        average = [mean(values[i] for values in series) for i in range(count)]
        axes.plot(steps, average, color=f"C{color}", label=name)
    axes.set(xlabel="step", ylabel="relative error of the update", yscale="log")
    axes.set_title(f"Update against an uncompressed second moment, k = {rank}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_bytes()
    rows: dict[str, Any] = {}
    heads = "| V | update X | clipped X | largest | vanished | clip | loss |"
    print(f"| k = {options.rank} {heads}")
    print("|---" * 8 + "|")
    for name, knobs in METHODS.items():
        shadows: list[Shadow] = []
        rank = options.rank * (2 if "twice" in name else 1)
        ranks = {"rank_min": rank, "rank_init": rank, "rank_max": rank}
        with ExitStack() as stack:
            for change in CHANGES.get(name, ()):
                stack.enter_context(change)
            loss = train(
                data,
                lambda params, lr, knobs=knobs, ranks=ranks: Adapprox(
                    params, lr, weight_decay=0.1, **ranks, **knobs
                ),
                lr=LR,
                seed=0,
                steps=options.steps,
                watch=lambda o, shadows=shadows: shadows.append(Shadow(o, EVERY)),
            )
        e = shadows[0].mean(last=options.steps // 30)
        series = {p: [round(r.update, 5) for r in rs] for p, rs in shadows[0].records.items()}
        rows[name] = {**asdict(e), "held_out_loss": loss, "update_by_parameter": series}
        print(
            f"| {name} | {e.moment:.3f} | {e.update:.3f} | {e.clipped_update:.3f} | "
            f"{e.largest:.1f} | {e.vanished:.1%} | {e.clip:.2f} | {loss:.3f} |",
            flush=True,
        )
    result = Path(__file__).parent / "results" / f"update_error_k{options.rank}.json"
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"steps": options.steps, "lr": LR, "methods": rows}) + "\n")
    draw(rows, options.rank, result.with_suffix(".png"))
    ratio = rows["default (tracking, balanced)"]["update"] / rows["paper"]["update"]
    print(f"update error of the default / of the paper's at equal bytes: {ratio:.2f}")


if __name__ == "__main__":
    main()
