# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 8: megabytes of optimizer state at fixed ranks, from the optimizer itself.

    python examples/paper/table8_memory.py

Allocates Adapprox's state for GPT-2 on the meta device, so that no memory is needed, counts its
bytes and sets them beside the paper's. Writes results/table8_memory.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from adapprox_ds import Adapprox

RANKS = (1, 8, 16, 32, 64, 128, 256)
MODELS = {
    "GPT-2 124M": GPT2Config(),
    "GPT-2 345M": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
}
#: Table 8 of the paper, in MB (2^20 bytes): one value a rank, then AdamW.
PAPER = {
    "GPT-2 124M": (475.93, 481.27, 487.39, 499.61, 524.06, 572.95, 670.74, 949.40),
    "GPT-2 345M": (1356.47, 1368.40, 1382.02, 1409.28, 1463.79, 1572.81, 1790.85, 2707.09),
}
RESULT = Path(__file__).parent / "results" / "table8_memory.json"


def state_bytes(config: GPT2Config, rank: int) -> tuple[int, int]:
    """Bytes of Adapprox's state with every matrix at ``rank``, and of AdamW's."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    optimizer = Adapprox(model.named_parameters(), rank_init=rank, rank_max=256)
    optimizer.init_state()
    metrics = optimizer.metrics()
    return metrics.state_bytes, metrics.adamw_state_bytes


def table() -> dict[str, dict[str, list[int]]]:
    """For each model the bytes at each rank, then AdamW's."""
    rows = {}
    for name, config in MODELS.items():
        counted = [state_bytes(config, rank) for rank in RANKS]
        rows[name] = {"bytes": [ours for ours, _ in counted] + [counted[0][1]]}
    return rows


def main() -> None:
    rows = table()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"ranks": RANKS, "models": rows}, indent=1) + "\n")
    heads = [f"k = {k}" for k in RANKS] + ["AdamW"]
    print("| MB (2^20 bytes) | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, row in rows.items():
        ours = [f"{n / 2**20:.2f}" for n in row["bytes"]]
        print(f"| {name} | " + " | ".join(ours) + " |")
        print("| paper | " + " | ".join(f"{n:.2f}" for n in PAPER[name]) + " |")


if __name__ == "__main__":
    main()
