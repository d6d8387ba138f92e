# SPDX-License-Identifier: Apache-2.0
"""How far each method's update is from the uncompressed one, over a real training run.

    python examples/paper/update_error.py [--rank 8] [--steps 300]

Every run keeps all matrices at one rank, so all hold the same bytes, and carries a dense shadow of
the second moment (adapprox_ds.report.shadow). Writes results/update_error_k<rank>.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from small_gpt import load_bytes, train

from adapprox_ds import Adapprox
from adapprox_ds.report.shadow import Shadow

METHODS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "paper, on sqrt(V)": {"preset": "paper", "factor": "std"},
    "tracking, unbalanced": {"balanced": False},
    "default (tracking, balanced)": {},
    "default, floor 0.1": {"floor": 0.1},
    "default, floor 0.3": {"floor": 0.3},
}
LR = 4e-3


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
        ranks = {"rank_min": options.rank, "rank_init": options.rank, "rank_max": options.rank}
        loss = train(
            data,
            lambda params, lr, knobs=knobs, ranks=ranks: Adapprox(
                params, lr, weight_decay=0.1, **ranks, **knobs
            ),
            lr=LR,
            seed=0,
            steps=options.steps,
            watch=lambda o, shadows=shadows: shadows.append(Shadow(o)),
        )
        e = shadows[0].mean(last=options.steps // 30)
        rows[name] = {**asdict(e), "held_out_loss": loss}
        print(
            f"| {name} | {e.moment:.3f} | {e.update:.3f} | {e.clipped_update:.3f} | "
            f"{e.largest:.1f} | {e.vanished:.1%} | {e.clip:.2f} | {loss:.3f} |",
            flush=True,
        )
    result = Path(__file__).parent / "results" / f"update_error_k{options.rank}.json"
    result.parent.mkdir(exist_ok=True)
    result.write_text(
        json.dumps({"steps": options.steps, "lr": LR, "methods": rows}, indent=1) + "\n"
    )
    ratio = rows["default (tracking, balanced)"]["update"] / rows["paper"]["update"]
    print(f"update error of the default / of the paper's at equal bytes: {ratio:.2f}")


if __name__ == "__main__":
    main()
