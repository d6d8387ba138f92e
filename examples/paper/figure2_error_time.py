# SPDX-License-Identifier: Apache-2.0
"""The paper's Figure 2: error and time of S-RSI, of Adafactor's rank 1 and of a truncated SVD.

    python examples/paper/figure2_error_time.py [--matrix mlp.c_fc] [--repeats 5]

Trains a GPT with AdamW and approximates V = exp_avg_sq of one of its matrices, and sqrt(V), by
S-RSI (Algorithm 1, l = p = 5), by the SVD and, as Adafactor does, by row and column means; for
sqrt(V) Adafactor's is the root of what it makes of V. The paper's sizes are --width 1024
--layers 24 --steps 45000 --lr 3e-4. Medians over sketches and repeats. Prints a table, writes
results/figure2_error_time.json and a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_step import seconds
from second_moments import MATRICES, add_arguments, facts, second_moments
from torch import Tensor

from adapprox_ds.adapprox.srsi import error_ratio, srsi

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ITERATIONS, OVERSAMPLING = 5, 5
KINDS = ("V", "sqrt(V)")


def adafactor(v: Tensor) -> tuple[Tensor, Tensor]:
    """Q and U of rank 1: outer product of row and column means, divided by the mean."""
    return v.mean(1, keepdim=True) / v.mean(), v.mean(0).unsqueeze(1)


def truncated_svd(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Q and U of the best rank-k approximation, from a full SVD."""
    left, values, right = torch.linalg.svd(a, full_matrices=False)
    return left[:, :k], right[:k].T * values[:k]


def approximate(v: Tensor, kind: str, repeats: int) -> dict[str, Any]:
    """Errors and times for one matrix.

    Args:
        v: the second moment.
        kind: of ``KINDS``, what is approximated.
        repeats: sketches, and measurements of time.
    """
    a = v if kind == "V" else v.sqrt()
    device = a.device.type
    ranks = [k for k in RANKS if k + OVERSAMPLING <= min(a.shape)]

    def time_of(work: Callable[[], Any]) -> float:
        work()
        return median(seconds(work, device) for _ in range(repeats))

    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, Any] = {"ranks": ranks, "S-RSI": [], "SVD": [], "S-RSI s": []}
    for k in ranks:
        size = (a.shape[1], k + OVERSAMPLING)
        sketches = [torch.randn(size, generator=generator, device=device) for _ in range(repeats)]
        errors = [float(error_ratio(a, *srsi(a, k, s, ITERATIONS))) for s in sketches]
        found["S-RSI"].append(median(errors))
        found["SVD"].append(float(error_ratio(a, *truncated_svd(a, k))))
        found["S-RSI s"].append(time_of(partial(srsi, a, k, sketches[0], ITERATIONS)))
    q, u = adafactor(v)
    if kind == "sqrt(V)":
        q, u = q.sqrt(), u.sqrt()
    found["Adafactor"] = float(error_ratio(a, q, u))
    found["Adafactor s"] = time_of(partial(adafactor, v))
    found["SVD s"] = time_of(partial(truncated_svd, a, ranks[0]))
    return found


def draw(rows: dict[str, Any], title: str, where: str, path: Path) -> None:
    """Errors of V and of its root, and times of V."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=False):
        axes.set(title=f"Error of {kind}, {title}", ylabel="relative Frobenius error")
    panels[2].set(title=f"Time for V, {where}", ylabel="seconds")
    times = {key: rows["V"][f"{key} s"] for key in ("S-RSI", "SVD", "Adafactor")}
    ranks = rows["V"]["ranks"]
    for axes, row in zip(panels, (*(rows[kind] for kind in KINDS), times), strict=True):
        # A full SVD serves all ranks: one time.
        svd = row["SVD"] if isinstance(row["SVD"], list) else [row["SVD"]] * len(ranks)
        axes.plot(ranks, row["S-RSI"], "o-", label="S-RSI, l = p = 5")
        axes.plot(ranks, svd, "x--", label="SVD")
        axes.axhline(row["Adafactor"], color="C2", linestyle=":", label="Adafactor, rank 1")
    for axes in panels:
        axes.set(xlabel="rank k", xscale="log", yscale="log")
        axes.set_xticks(ranks, [str(k) for k in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--matrix", choices=MATRICES, default="mlp.c_fc")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    v = second_moments(options)[options.matrix]
    rows = {kind: approximate(v, kind, options.repeats) for kind in KINDS}
    shape = f"{v.shape[0]} x {v.shape[1]}"
    threads = torch.get_num_threads()
    where = f"CPU, {threads} thread{'s' * (threads > 1)}"
    if v.is_cuda:
        where = torch.cuda.get_device_name()
    print(f"{options.matrix}, {shape}; {where}\n")
    heads = [f"{kind}: {method}" for kind in KINDS for method in ("S-RSI", "SVD")] + ["S-RSI, s"]
    print("| k | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for i, k in enumerate(rows["V"]["ranks"]):
        cells = [f"{rows[kind][method][i]:.4f}" for kind in KINDS for method in ("S-RSI", "SVD")]
        print(f"| {k} | " + " | ".join(cells) + f" | {rows['V']['S-RSI s'][i]:.1e} |")
    for kind in KINDS:
        print(f"Adafactor's error of {kind}: {rows[kind]['Adafactor']:.4f}")
    print(f"SVD {rows['V']['SVD s']:.1e} s, Adafactor {rows['V']['Adafactor s']:.1e} s")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "figure2_error_time.json"
    about = {"matrix": options.matrix, "shape": list(v.shape), "device": where}
    path.write_text(json.dumps({**facts(options), **about, "kinds": rows}, indent=1) + "\n")
    draw(rows, f"{options.matrix} ({shape})", where, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
