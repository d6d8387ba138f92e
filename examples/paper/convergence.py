# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's two convergence theorems (arXiv 2405.15593), and what runs of T steps show.

    python examples/paper/convergence.py [--steps 200 800 3200 12800]

Theorem 1, smooth and non-convex: at a rate of c / sqrt(T) the mean over the steps of the squared
gradient norm falls as T^(-1/2), as AMSGrad's. Theorem 2, under the Polyak-Lojasiewicz condition: at
c log(T) / T the gap f - f* after the last step falls as log(T) / T. Both are upper bounds, and of
another algorithm than the one that is run: its moments are dense, with AMSGrad's maximum, where
Algorithm 1 has a window, and its quantiser is unbiased and far finer than 4 bits. So both are run:
MicroAdam, and "top 1 % + feedback", which is AMSGrad on the largest 1 % of gradient and error. The
control leaves the error feedback out: it gives MicroAdam gradients in which all but the largest 1 %
are 0, so that no error is left. Were feedback of no use, it would do as well.

Seen: with feedback both fall as AMSGrad does, and faster under the condition, at 1.5 to 5 times its
values; without, MicroAdam all but stalls (docs/evidence.md).

f is the mean of 2048 terms, of which a step sees 64 drawn at random. Non-convex: regression with
the loss sqrt(1 + r^2) and a penalty w^2 / (1 + w^2), whose gradients are bounded, as the theorem
wants. Polyak-Lojasiewicz: least squares in which every feature is there eight times, so that minima
fill a subspace; the gradient's noise does not vanish there. c is each optimizer's best of the same
at the largest T, and kept for the others. Five seeds, of the start and of the samples. Prints
slopes of log against log T with the smallest and largest of the seeds, and writes
results/convergence.json and a picture; five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from adapprox_ds import MicroAdam

mpl.use("Agg")
import matplotlib.pyplot as plt

DIM, SAMPLES, BATCH, SEEDS, COPIES = 512, 2048, 64, 5, 8
#: The penalty's curvature at 0, and the weight at which it has fallen to below 0.
PENALTY, BEND = 0.05, 0.2
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
DENSITY = 0.01


def micro(**knobs: Any) -> Callable[[list], torch.optim.Optimizer]:
    """MicroAdam with a block a seed."""
    return lambda groups: MicroAdam(groups, weight_decay=0.0, block_size=DIM, **knobs)


def amsgrad(groups: list) -> torch.optim.Optimizer:
    """torch's."""
    return torch.optim.Adam(groups, amsgrad=True)


#: The optimizer, what it gets of the gradient, and its line in the picture.
METHODS: dict[str, tuple[Callable[[list], torch.optim.Optimizer], str, str]] = {
    "AMSGrad": (amsgrad, "all", "k-"),
    "top 1 % + feedback": (amsgrad, "largest of gradient and error", "C2-"),
    "MicroAdam": (micro(density=DENSITY), "all", "C0-"),
    "MicroAdam, window = 2, density = 0.05": (micro(window=2, density=0.05), "all", "C1-"),
    "MicroAdam, no feedback": (micro(density=DENSITY), "largest", "C3--"),
}


class Problem:
    """f of many weights at once, (..., DIM): its noisy gradient, and what a theorem bounds.

    Attributes:
        convex: whether it is least squares; else the one with the penalty.
        x, y: features, (SAMPLES, DIM), and targets.
        best: what the least squares' minima predict.
    """

    def __init__(self, convex: bool) -> None:
        self.convex = convex
        generator = torch.Generator().manual_seed(0)
        count = DIM // COPIES if convex else DIM
        scales = torch.logspace(-1, 0, count)
        x = torch.randn(SAMPLES, count, generator=generator) * scales
        truth = torch.randn(count, generator=generator) * 2.0 / scales.norm()
        self.y = x @ truth + 0.5 * torch.randn(SAMPLES, generator=generator)
        self.x = x.repeat_interleave(COPIES, 1) if convex else x
        wide = x.double()
        self.best = (wide @ torch.linalg.lstsq(wide, self.y.double()).solution).float()

    def gradient(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """On samples x, (..., n, DIM), of weights (..., m, DIM)."""
        r = w @ x.mT - y.unsqueeze(-2)
        if self.convex:
            return r @ x / y.shape[-1]
        penalty = PENALTY * w / (1.0 + (w / BEND).square()).square()
        return (r / (1.0 + r.square()).sqrt()) @ x / y.shape[-1] + penalty

    def bounded(self, w: Tensor) -> Tensor:
        """The squared norm of the exact gradient, or f - f* for least squares, (...)."""
        if self.convex:
            return (w @ self.x.T - self.best).square().mean(-1) / 2.0
        return self.gradient(w, self.x, self.y).square().sum(-1)

    def rate(self, steps: int) -> float:
        """The learning rate of the theorem over c."""
        return math.log(steps) / steps if self.convex else steps**-0.5


def largest(a: Tensor) -> Tensor:
    """With all but the largest 1 % of each row at 0."""
    places = a.abs().topk(math.ceil(DENSITY * a.shape[-1]), dim=-1).indices
    return torch.zeros_like(a).scatter_(-1, places, a.gather(-1, places))


def points(steps: int) -> list[int]:
    """The steps at which a curve is measured: dense at first, where it falls most."""
    even, early = torch.linspace(0, steps, 33), torch.logspace(0, math.log10(steps), 33)
    return sorted({round(float(step)) for step in [*even, *early]})


def run(problem: Problem, method: str, steps: int) -> Tensor:
    """What the theorem bounds at some steps, (points, seeds, RATES)."""
    build, given, _ = METHODS[method]
    generator = torch.Generator().manual_seed(1)
    start = BEND * torch.randn(SEEDS, DIM, generator=generator)
    weights = [torch.nn.Parameter(start.clone()) for _ in RATES]
    rates = [c * problem.rate(steps) for c in RATES]
    optimizer = build([{"params": [p], "lr": lr} for p, lr in zip(weights, rates, strict=True)])
    error, curve, measured = torch.zeros(SEEDS, len(RATES), DIM), [], set(points(steps))
    for step in range(steps + 1):
        w = torch.stack([p.detach() for p in weights], 1)
        if step in measured:
            curve.append(problem.bounded(w))
        rows = torch.randint(SAMPLES, (SEEDS, BATCH), generator=generator)
        g = problem.gradient(w, problem.x[rows], problem.y[rows])
        if given != "all":
            whole = g + error
            g = largest(whole)
            if given == "largest of gradient and error":
                error = whole - g
        for i, p in enumerate(weights):
            p.grad = g[:, i].contiguous()
        optimizer.step()
    return torch.stack(curve)


def slopes(steps: Sequence[int], values: Tensor) -> Tensor:
    """Of log values, (len(steps), n), against log steps: (n,)."""
    x = torch.tensor(steps).log()
    x = x - x.mean()
    return (x @ values.log()) / (x @ x)


def examine(problem: Problem, method: str, steps: Sequence[int]) -> dict[str, Any]:
    """A method's row."""
    curves = [run(problem, method, count) for count in steps]
    if problem.convex:
        found = torch.stack([curve[-1] for curve in curves])
    else:
        means = zip(curves, steps, strict=True)
        found = torch.stack(
            [torch.trapezoid(y, torch.tensor(points(t)), dim=0) / t for y, t in means]
        )
    best = int(found[-1].mean(0).argmin())
    slope, curve = slopes(steps, found[..., best]), curves[-1][..., best]
    return {
        "c": RATES[best],
        "bounded": found[..., best].mean(1).tolist(),
        "slope": [float(f) for f in (slope.mean(), slope.min(), slope.max())],
        "by_c": dict(zip(map(str, RATES), found[-1].mean(0).tolist(), strict=True)),
        "curve": [[float(f(c)) for f in (torch.mean, torch.min, torch.max)] for c in curve],
    }


def draw(problems: dict[str, Any], steps: Sequence[int], path: Path) -> None:
    """Curves of the longest runs with the seeds' range, and the ends of all runs."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (title, found), (left, right) in zip(problems.items(), panels, strict=True):
        for name, row in found["methods"].items():
            mean, low, high = zip(*row["curve"], strict=True)
            at = points(steps[-1])
            left.plot(at, mean, METHODS[name][2], lw=1)
            left.fill_between(at, low, high, color=METHODS[name][2][:-1].rstrip("-"), alpha=0.15)
            right.plot(steps, row["bounded"], METHODS[name][2], marker="o", ms=3, label=name)
        first = found["methods"]["AMSGrad"]["bounded"][0]
        bound = [first * b / found["theory"][0] for b in found["theory"]]
        right.plot(steps, bound, "k:", label="the theorem's rate")
        left.set(title=title, yscale="log", xlabel="step", ylabel=found["bounds"])
        right.set(title="against T", xscale="log", yscale="log", xlabel="T")
    lines = panels[0][1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 800, 3200, 12800])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problems: dict[str, Any] = {}
    for title, convex in (("non-convex", False), ("Polyak-Lojasiewicz", True)):
        problem = Problem(convex)
        theory = [problem.rate(count) for count in options.steps]
        slope = float(slopes(options.steps, torch.tensor(theory)[:, None]))
        bounds = "f - f*" if convex else "squared gradient norm"
        rows: dict[str, Any] = {}
        problems[title] = {"bounds": bounds, "theory": theory, "slope": slope, "methods": rows}
        print(f"{title}: {bounds} by T; the theorem's slope is {slope:.2f}\n")
        print("| optimizer | c | " + " | ".join(f"T = {t}" for t in options.steps) + " | slope |")
        print("|---" * (len(options.steps) + 3) + "|")
        for name in METHODS:
            row = rows[name] = examine(problem, name, options.steps)
            cells = [f"{v:.2e}" for v in row["bounded"]]
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*row["slope"]))
            print(f"| {name} | {row['c']:g} | " + " | ".join(cells) + " |", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "convergence.json"
    path.write_text(json.dumps({"steps": options.steps, "problems": problems}, indent=1) + "\n")
    draw(problems, options.steps, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
