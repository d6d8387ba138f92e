# SPDX-License-Identifier: Apache-2.0
"""The picture of a run, from its CSV files."""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Curve = dict[int, float]


def plot_run(folder: Path, unigram_nats: float) -> Path:
    """Draws ``training.png``: the loss, and if the run has factors their rank and error by layer.

    Args:
        folder: Of the run, with ``metrics.csv`` and ``ranks.csv``.
        unigram_nats: Drawn as a line, the loss of token frequencies alone.

    Returns:
        Path of the picture.
    """
    metrics = _read(folder / "metrics.csv")
    ranks = _read(folder / "ranks.csv")
    panels = 3 if ranks else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(6.0 * panels, 4.8), layout="constrained", squeeze=False
    )
    _plot_loss(axes[0, 0], metrics, unigram_nats)
    if ranks:
        _plot_layers(axes[0, 1], _by_layer(ranks, "rank"))
        axes[0, 1].set(title="Rank of the second moment", ylabel="mean rank k of the layer")
        axes[0, 1].set_ylim(bottom=0)
        _plot_layers(axes[0, 2], _by_layer(ranks, "error"))
        axes[0, 2].set(
            title="Error of the factors", ylabel="mean relative Frobenius error ξ", yscale="log"
        )
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="layer")
    path = folder / "training.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _plot_loss(axes: Axes, metrics: list[dict[str, str]], unigram_nats: float) -> None:
    steps = [int(row["step"]) for row in metrics]
    axes.plot(steps, [float(row["train_loss"]) for row in metrics], lw=1.2, label="training")
    held_out = [
        (int(row["step"]), float(row["held_out_loss"])) for row in metrics if row["held_out_loss"]
    ]
    axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
    axes.axhline(unigram_nats, color="0.4", ls="--", label=f"unigram entropy {unigram_nats:.2f}")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="cross-entropy (nats/token)")
    axes.grid(alpha=0.3)
    axes.legend()


def _by_layer(rows: list[dict[str, str]], column: str) -> dict[str, Curve]:
    """Means of a column over the matrices and shards of each layer, by step."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[_layer(row["parameter"])][int(row["step"])].append(float(row[column]))
    return {
        layer: {step: sum(v) / len(v) for step, v in sorted(curve.items())}
        for layer, curve in sorted(values.items(), key=lambda item: _depth(item[0]))
    }


def _layer(parameter: str) -> str:
    """``transformer.h.3.mlp.c_fc.weight`` -> ``block 3``; embeddings are layers of their own."""
    parts = parameter.split(".")
    if "h" in parts:
        return f"block {parts[parts.index('h') + 1]}"
    return {"wte": "tokens", "wpe": "positions"}.get(parts[-2], parts[-2])


def _depth(layer: str) -> tuple[int, str]:
    kind, _, number = layer.partition(" ")
    return (int(number), kind) if number else (-1, kind)


def _plot_layers(axes: Axes, curves: dict[str, Curve]) -> None:
    blocks = [layer for layer in curves if layer.startswith("block")]
    shades = plt.get_cmap("viridis")([index / len(blocks) for index in range(len(blocks))])
    colours = dict(zip(blocks, shades, strict=True))
    for layer, curve in curves.items():
        # Dashes tell the embeddings from the blocks, whose colour runs with depth.
        axes.plot(
            list(curve),
            list(curve.values()),
            color=colours.get(layer, "C3" if layer == "tokens" else "C1"),
            ls="-" if layer in colours else "--",
            lw=1.5,
            label=layer,
        )
    axes.set(xlabel="optimizer step")
    axes.grid(alpha=0.3, which="both")
