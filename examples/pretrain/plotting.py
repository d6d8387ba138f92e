# SPDX-License-Identifier: Apache-2.0
"""The picture of a run, from its CSV files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from adapprox_ds.report.plot import draw_layers
from adapprox_ds.report.runs import TRAINING, read_run


def plot_run(folder: Path, unigram_nats: float) -> None:
    """Draws ``training.png``: the loss, and if the run has factors their rank and error by layer.

    Args:
        folder: Of the run, with ``metrics.csv`` and ``ranks.csv``.
        unigram_nats: Drawn as a line, the loss of token frequencies alone.
    """
    run = read_run(folder)
    panels = 3 if run.layers else 1
    figure = Figure(figsize=(6.0 * panels, 4.8), layout="constrained")
    loss, *others = figure.subplots(1, panels, squeeze=False)[0]
    for name, curve in run.losses.items():
        loss.plot(*curve, "-" if name == TRAINING else "o-", lw=1.2, label=name)
    loss.axhline(unigram_nats, color="0.4", ls="--", label=f"unigram entropy {unigram_nats:.2f}")
    loss.set(title="Loss", ylabel=f"cross-entropy ({run.unit})")
    loss.legend()
    if others:
        rank, error = others
        draw_layers(rank, run.layers)
        rank.set(title="Rank of the second moment", ylabel="mean rank k of the layer")
        rank.set_ylim(bottom=0)
        draw_layers(error, run.errors)
        error.set(title="Error of the factors", ylabel="mean relative Frobenius error ξ")
        error.set_yscale("log")
        figure.legend(*rank.get_legend_handles_labels(), loc="outside right upper", title="layer")
    for axes in figure.axes:
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "training.png", dpi=120)


def plot_comparison(folders: Sequence[Path], picture: Path) -> None:
    """Draws the losses of several runs over each other.

    Args:
        folders: Of the runs, each named by its folder.
        picture: Where it goes, as a PNG.
    """
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    axes = figure.subplots()
    for i, folder in enumerate(folders):
        run = read_run(folder)
        for name, curve in run.losses.items():
            style = "-" if name == TRAINING else "o--"
            axes.plot(*curve, style, color=f"C{i}", lw=1.2, ms=4, label=f"{folder.name}: {name}")
    axes.set(xlabel="optimizer step", ylabel=f"cross-entropy ({run.unit})", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
