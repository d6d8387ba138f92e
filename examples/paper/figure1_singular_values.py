# SPDX-License-Identifier: Apache-2.0
"""The paper's Figure 1: singular values of real second moments, and of their roots.

    python examples/paper/figure1_singular_values.py [--top 60]

Trains a GPT with AdamW and decomposes V = exp_avg_sq of a middle layer's four matrices, and
sqrt(V). The paper's sizes are --width 1024 --layers 24 --steps 45000 --lr 3e-4. Prints how much
rank each needs, writes results/figure1_singular_values.json and a picture.
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
from second_moments import add_arguments, facts, second_moments
from torch import Tensor

KINDS = ("V", "sqrt(V)")
#: Share of the squared Frobenius norm that the table's ranks hold.
ENERGY = 0.99


def spectrum(a: Tensor) -> list[float]:
    """All singular values over the largest, in fp64: fp32 has a floor near 1e-7."""
    values = torch.linalg.svdvals(a.double())
    return (values / values[0]).tolist()


def error_at(values: list[float], k: int) -> float:
    """Relative Frobenius error of the best rank-k approximation."""
    return math.sqrt(sum(s * s for s in values[k:]) / sum(s * s for s in values))


def rank_for(values: list[float], energy: float) -> int:
    """The least rank that holds this share of the squared norm."""
    return next(k for k in range(len(values) + 1) if error_at(values, k) ** 2 <= 1 - energy + 1e-12)


def draw(rows: dict[str, Any], top: int, path: Path) -> None:
    """One panel for V, one for its root."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=True):
        for name, row in rows.items():
            m, n = row["shape"]
            values = row[kind]["singular_values"][:top]
            axes.plot(range(1, len(values) + 1), values, label=f"{name}, {m} x {n}")
        axes.set(xlabel="index of the singular value", title=f"Singular values of {kind}")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="singular value / the largest", yscale="log")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--top", type=int, default=60, help="singular values to draw")
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    shares = [f"rank for {ENERGY:.0%} of {kind}" for kind in KINDS]
    errors = [f"best error of {kind}, k = {k}" for kind in KINDS for k in (1, 8)]
    heads = ["matrix", "shape", *shares, *errors]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, v in second_moments(options).items():
        m, n = v.shape
        row = rows[name] = {"shape": [m, n]}
        for kind, a in zip(KINDS, (v, v.sqrt()), strict=True):
            values = spectrum(a)
            row[kind] = {
                "singular_values": [float(f"{s:.4g}") for s in values],
                "rank_for_energy": rank_for(values, ENERGY),
                "error": {str(k): error_at(values, k) for k in (1, 8)},
            }
        cells = [str(row[kind]["rank_for_energy"]) for kind in KINDS]
        cells += [f"{row[kind]['error'][k]:.3f}" for kind in KINDS for k in ("1", "8")]
        print(f"| {name} | {m} x {n} | " + " | ".join(cells) + " |")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "figure1_singular_values.json"
    path.write_text(json.dumps({**facts(options), "energy": ENERGY, "matrices": rows}) + "\n")
    draw(rows, options.top, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
