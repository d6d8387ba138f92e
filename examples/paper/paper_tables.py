# SPDX-License-Identifier: Apache-2.0
"""The tables of examples/paper/README.md, from the result files; readme_tables.py writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: Table 1 of the paper, seconds on an A100: (n, k).
PAPER_TABLE_1 = {(1024, 8): 7.6e-4, (1024, 64): 8.8e-4, (1024, 256): 1.5e-3}
#: Table 8, MB: by model and rank.
PAPER_TABLE_8 = {
    "GPT-2 124M": {"1": 475.93, "8": 481.27, "16": 487.39, "256": 670.74, "AdamW": 949.40},
    "GPT-2 345M": {"1": 1356.47, "8": 1368.40, "16": 1382.02, "256": 1790.85, "AdamW": 2707.09},
}
#: Table 4, seconds an iteration of GPT-2 117M.
PAPER_TABLE_4 = {
    "AdamW, fused": 1.81,
    "Adafactor (torch)": 1.84,
    "CAME": 1.85,
    "Adapprox, paper, k = 8": 1.92,
    "Adapprox, k = 8": None,
}


def load(name: str) -> dict[str, Any]:
    """One result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figure1() -> str:
    """What rank each matrix needs."""
    data = load("figure1_singular_values")
    share = f"{data['energy']:.0%}"
    heads = ["matrix", "shape", f"rank for {share} of V", f"rank for {share} of sqrt(V)"]
    heads += ["best error of V, k = 8", "best error of sqrt(V), k = 8"]
    return markdown(
        heads,
        (
            [
                name,
                "{} x {}".format(*row["shape"]),
                *(str(row[kind]["rank_for_energy"]) for kind in ("V", "sqrt(V)")),
                *(f"{row[kind]['error']['8']:.3f}" for kind in ("V", "sqrt(V)")),
            ]
            for name, row in data["matrices"].items()
        ),
    )


def table1() -> str:
    """Seconds of S-RSI."""
    data = load("bench_step_cpu_124m")
    heads = ["n", "k", f"ours, {data['threads']} CPU threads, s", "paper, A100, s"]
    rows = []
    for row in data["srsi"]:
        paper = PAPER_TABLE_1.get((row["n"], row["k"]))
        cells = [str(row["n"]), str(row["k"]), f"{row['seconds']:.1e}"]
        rows.append([*cells, f"{paper:.1e}" if paper else ""])
    return markdown(heads, rows)


def figure3() -> str:
    """Ranks in the last half of the run."""
    data = load("figure3_ranks")
    return markdown(
        [f"k_max = {data['rank_max']}", "mean rank of the last half", "smallest", "largest"],
        (
            [name, f"{row['mean']:.1f}", str(row["least"]), str(row["most"])]
            for name, row in data["methods"].items()
        ),
    )


def table8() -> str:
    """Bytes of state, ours and the paper's."""
    data = load("table8_memory")
    columns = [*(str(rank) for rank in data["ranks"]), "AdamW"]
    heads = ["model", *(f"k = {c}" if c != "AdamW" else c for c in columns)]
    rows = []
    for model, row in data["models"].items():
        ours = [f"{size / 2**20:.2f}" for size in row["bytes"]]
        rows.append([f"{model}, MB", *ours])
        paper = PAPER_TABLE_8[model]
        rows.append(["paper", *(f"{paper[c]:.2f}" if c in paper else "" for c in columns)])
    return markdown(heads, rows)


def figure4() -> str:
    """Held-out losses of the paper's optimizers over seeds."""
    rows = []
    for name, row in load("losses")["optimizers"].items():
        if name in ("AdamW", "Adafactor", "CAME") or name.startswith("Adapprox"):
            gap = row.get("minus_adamw")
            seeds = ", ".join(f"{loss:.3f}" for loss in row["losses"])
            shown = f"{gap[0]:+.3f} ± {gap[1]:.3f}" if gap else ""
            rows.append([name, str(row["lr"]), f"{mean(row['losses']):.3f}", shown, seeds])
    return markdown(["nats a byte", "best rate", "mean", "minus AdamW", "by seed"], rows)


def table4() -> str:
    """Time of a step over AdamW's."""
    found = load("bench_step_cpu_124m")["optimizers"]
    rows = []
    for name, seconds in PAPER_TABLE_4.items():
        if name in found:
            paper = f"{seconds / PAPER_TABLE_4['AdamW, fused']:.2f}" if seconds else ""
            ratio = found[name].get("ratio", 1.0)
            rows.append([name, f"{ratio:.1f}", paper])
    return markdown(["", "a step over fused AdamW's", "paper, an iteration over AdamW's"], rows)


def figure5() -> str:
    """Losses with and without first moment."""
    data = load("figure5_first_moment")
    rows = []
    for name, row in data["optimizers"].items():
        kinds = (row["with"], row["without"])
        cells = ["diverged" if k["diverged"] else f"{mean(k['losses']):.3f}" for k in kinds]
        gap = ""
        if "without_minus_with" in row:
            gap = f"{row['without_minus_with']:+.3f} ± {row['interval_95']:.3f}"
        rows.append([name, *cells, gap])
    heads = [f"nats a byte after {data['steps']} steps", "with", "without", "without minus with"]
    return markdown(heads, rows)


def tables6_7() -> str:
    """Errors of S-RSI over the optimum."""
    data = load("tables6_7_srsi")
    tables = []
    for varied, fixed in (("l", "p = 5"), ("p", "l = 5")):
        heads = [f"{varied} ({fixed})", "paper", "paper / its l = 10"]
        heads += [f"{name}, n = {row['n']}" for name, row in data["matrices"].items()]
        rows = []
        for i, paper in enumerate(data["paper"][varied]):
            ours = [f"{row[varied][i] / row['optimum']:.3f}" for row in data["matrices"].values()]
            over = f"{paper / data['paper']['l'][-1]:.3f}"
            rows.append([str(i + 1), f"{paper:.4f}", over, *ours])
        tables.append(markdown(heads, rows))
    return "\n\n".join(tables)


def tables3_5() -> str:
    """Accuracy on sentences, by optimizer."""
    rows = []
    for name, row in load("tables3_5_finetune")["optimizers"].items():
        gap = ""
        if name != "AdamW":
            gap = "{:+.1f} ± {:.1f}".format(*(100 * x for x in row["encoder_minus_adamw"]))
        seeds = ", ".join(f"{x:.1%}" for x in row["encoder"])
        state = f"{row['state_bytes'] / 2**20:.0f}"
        rows.append(
            [name, str(row["encoder_lr"]), f"{mean(row['encoder']):.1%}", seeds, gap, state]
        )
    heads = ["optimizer", "best rate", "accuracy", "by seed", "points minus AdamW", "state, MB"]
    return markdown(heads, rows)


TABLES = (figure1, table1, figure3, table8, figure4, table4, tables3_5, figure5, tables6_7)
