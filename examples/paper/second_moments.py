# SPDX-License-Identifier: Apache-2.0
"""Dense second moments of a GPT trained on real text, for the scripts that take them apart."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_gpt import build_model, load_bytes, train
from torch import Tensor

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the GPT and of its training, and where results go."""
    parser.add_argument("--steps", type=int, default=300, help="of AdamW (the paper: 45000)")
    parser.add_argument("--width", type=int, default=256, help="of the GPT (the paper: 1024)")
    parser.add_argument("--layers", type=int, default=2, help="of the GPT (the paper: 24)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW (the paper: 3e-4)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")


def facts(options: argparse.Namespace) -> dict[str, float]:
    """What a result file says of the training."""
    return {key: getattr(options, key) for key in ("steps", "width", "layers", "lr")}


def second_moments(options: argparse.Namespace) -> dict[str, Tensor]:
    """AdamW's ``exp_avg_sq`` of a middle layer's ``MATRICES`` after training, fp32.

    Where CUDA is available, the training is there, and so are the moments.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made: dict[str, torch.nn.Parameter] = {}
    optimizers: list[torch.optim.Optimizer] = []

    def build(params: list, lr: float) -> torch.optim.Optimizer:
        made.update(params)
        return torch.optim.AdamW(made.values(), lr, weight_decay=0.1)

    train(
        load_bytes(),
        build,
        lr=options.lr,
        seed=0,
        steps=options.steps,
        watch=optimizers.append,
        make_model=lambda seed: build_model(seed, options.width, options.layers).to(device),
    )
    layer = f"transformer.h.{options.layers // 2}."
    state = optimizers[0].state
    return {name: state[made[f"{layer}{name}.weight"]]["exp_avg_sq"] for name in MATRICES}
