# SPDX-License-Identifier: Apache-2.0
"""Memory a rank and traffic a step of both scopes, from 8 to 4,096 ranks, without training.

    python examples/paper/scopes_at_scale.py [--stage 3] [--rank 8]

ZeRO's cuts are simulated, and what of a piece is kept in how many bytes is asked of the optimizer's
own code, which tests compare with real runs. Second moments are compared with AdamW's shard and
with the whole model's factors divided by the number of ranks, traffic with the fp32 gradient's.
Bytes on the wire count all-reduces twice, and the gradient, which ZeRO reduce-scatters, once.
Prints a table; writes results/scopes_at_scale.json and a picture. Takes a minute.
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

from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.report.model_shapes import load_shapes
from adapprox_ds.report.state_bytes import flat_lengths, second_moments, step_traffic

MODELS = {"gpt2-345m": "GPT-2 345M", "llama-3-8b": "Llama 3 8B", "llama-3-70b": "Llama 3 70B"}
WORLDS = (8, 32, 128, 512, 4096)
#: What the pictures and tables call each choice, its scope and right factor, its colour.
SCOPES = {
    "partition": ("partition", None, "tab:blue"),
    "matrix, U replicated": ("matrix", "replicated", "tab:orange"),
    "matrix, U sharded": ("matrix", "sharded", "tab:green"),
}
RESULT = Path(__file__).parent / "results" / "scopes_at_scale.json"


def simulate(model: str, stage: int, rank: int, worlds: Sequence[int]) -> dict[str, Any]:
    """Bytes by scope and number of ranks."""
    groups = [tuple(tuple(s) for s in load_shapes(model).values())]
    numel = sum(math.prod(shape) for shape in groups[0])
    whole = second_moments(groups, 3, 1, rank, "fp32")[0][0]
    rows: dict[str, Any] = {name: {} for name in SCOPES}
    for world in worlds:
        for name, (scope, right_factor, _) in SCOPES.items():
            h = Hyperparameters(rank_max=rank, scope=scope, right_factor=right_factor)
            held, _ = second_moments(groups, stage, world, rank, "fp32", (scope, h.shards_u))
            sent = step_traffic(groups, stage, world, h)
            rows[name][str(world)] = {
                "second_bytes": max(held),
                "summed_bytes": sent.summed,
                "exchanged_bytes": sent.exchanged,
            }
    adamw = {str(w): 4 * sum(flat_lengths(groups[0], stage, w)) for w in worlds}
    return {"numel": numel, "whole_bytes": whole, "adamw_bytes": adamw, "scopes": rows}


def draw(data: dict[str, Any], path: Path) -> None:
    """Memory above, traffic below, a model a column."""
    models = data["models"]
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 6.6), squeeze=False)
    for column, (model, found) in enumerate(models.items()):
        memory, wire = axes[0][column], axes[1][column]
        worlds = [int(w) for w in found["adamw_bytes"]]
        adamw = [n / 2**20 for n in found["adamw_bytes"].values()]
        memory.plot(worlds, adamw, ":", color="black", label="AdamW's shard")
        memory.plot(
            worlds,
            [found["whole_bytes"] / w / 2**20 for w in worlds],
            "--",
            color="tab:gray",
            label="whole factors / ranks",
        )
        for name, (_, _, colour) in SCOPES.items():
            rows = found["scopes"][name].values()
            held = [row["second_bytes"] / 2**20 for row in rows]
            memory.plot(worlds, held, "o-", ms=4, color=colour, label=name)
            if name != "partition":
                wire.plot(worlds, [on_wire(row, found) for row in rows], "o-", ms=4, color=colour)
        memory.set(title=MODELS[model], xscale="log", yscale="log")
        wire.set(xscale="log", xlabel="ranks", ylim=(0, None))
        for axis in (memory, wire):
            axis.set_xticks(worlds, [str(w) for w in worlds])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("second moment, MB on the fullest rank")
    axes[1][0].set_ylabel("step's traffic, % of the fp32 gradient's")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def on_wire(row: dict[str, int], found: dict[str, Any]) -> float:
    """A step's traffic in percent of the fp32 gradient's."""
    sent: float = 2 * row["summed_bytes"] + row["exchanged_bytes"]
    return 100 * sent / (4 * found["numel"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    models = {
        model: simulate(model, options.stage, options.rank, options.worlds)
        for model in options.models
    }
    data = {"stage": options.stage, "rank": options.rank, "models": models}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(data, indent=1) + "\n")
    draw(data, options.result.with_suffix(".png"))
    for model, found in models.items():
        print(f"{MODELS[model]}, ZeRO-{options.stage}, k = {options.rank}")
        for name, rows in found["scopes"].items():
            cells = [
                f"{world}: {row['second_bytes'] / 2**20:.2f} MB, {on_wire(row, found):.2f} %"
                for world, row in rows.items()
            ]
            print(f"  {name}: " + "; ".join(cells))


if __name__ == "__main__":
    main()
