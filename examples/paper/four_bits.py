# SPDX-License-Identifier: Apache-2.0
"""Which map and which rounding of 4-bit first moments lose least, on dense Adam.

    python examples/paper/four_bits.py [--steps 150] [--loss-steps 400] [--seeds 4]

Groups of 128 elements share their largest absolute value as scale. Maps are powers of |c| / 7 and
the "dynamic exponent" of Li, Chen and Zhu (2023), which torchao's 4-bit AdamW has; each is rounded
to nearest and at random. First the relative error of the update against a first moment in full,
all along one run of dense Adam with the look-ahead of our default; then held-out losses, in pairs
of equal seeds, of runs that go on with the rounded moment. Writes results/four_bits.json; takes a
quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from losses import difference
from small_gpt import WARMUP, load_bytes, train
from torch import Tensor

GROUP = 128
BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 4e-3, 0.1
DYNAMIC = (0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0)
POWERS = (1.0, 1.5, 2.0, 2.5, 3.0)
MAPS = {f"power {p}": tuple((i / 7) ** p for i in range(8)) for p in POWERS}
MAPS |= {"dynamic exponent": DYNAMIC, "8 bits, power 2": tuple((i / 127) ** 2 for i in range(128))}
ROUNDINGS = ("nearest", "at random")


def rounded(m: Tensor, levels: tuple[float, ...], rounding: str) -> Tensor:
    """What a moment reads as after it was kept in codes."""
    flat = m.flatten()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    table, size = torch.tensor(levels), (groups.abs() / scale).clamp(max=1.0)
    above = torch.bucketize(size, table).clamp(1, len(levels) - 1)
    low, high = table[above - 1], table[above]
    part = (size - low) / (high - low)
    up = part > (0.5 if rounding == "nearest" else torch.rand_like(part))
    return (torch.where(up, high, low) * groups.sign() * scale).flatten()[: len(flat)].view_as(m)


class Adam(torch.optim.Optimizer):
    """Dense Adam with look-ahead whose matrices' first moment is kept in codes; None for in full.

    With ``others``, moments in those codes are carried along, and how far their updates are off.
    """

    def __init__(self, params: list, lr: float, kept: tuple[str, str] | None, others: list) -> None:
        super().__init__([p for _, p in params], {"lr": lr})
        self.kept, self.others, self.t = kept, others, 0
        self.errors: dict[tuple[str, str], list[float]] = {other: [] for other in others}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters."""
        self.t += 1
        beta1, beta2 = BETAS
        first, second = 1 / (1 - beta1 ** (self.t + 1)), 1 / (1 - beta2**self.t)
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if not state:
                    state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                    state["others"] = {other: torch.zeros_like(p) for other in self.others}
                state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                root = (state["v"] * second).sqrt() + EPS

                def ahead(m: Tensor, g: Tensor = g, root: Tensor = root) -> Tensor:
                    m.mul_(beta1).add_(g, alpha=1 - beta1)
                    return (beta1 * m + (1 - beta1) * g) * first / root

                update = ahead(state["m"])
                p.mul_(1 - group["lr"] * DECAY).add_(update, alpha=-group["lr"])
                if p.dim() < 2:
                    continue
                for other, m in state["others"].items():
                    off = ahead(m) - update
                    if self.t % 10 == 0 and self.t > WARMUP:
                        self.errors[other].append(float(off.norm() / update.norm()))
                    state["others"][other] = rounded(m, MAPS[other[0]], other[1])
                if self.kept is not None:
                    state["m"] = rounded(state["m"], MAPS[self.kept[0]], self.kept[1])


def run(kept: tuple[str, str] | None, others: list, seed: int, steps: int) -> tuple[float, Adam]:
    built: list[Adam] = []

    def build(params: list, lr: float) -> Adam:
        built.append(Adam(params, lr, kept, others))
        return built[-1]

    return train(load_bytes(), build, lr=LR, seed=seed, steps=steps), built[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of the run that errors are of")
    parser.add_argument("--loss-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [
        (name, r) for name in MAPS for r in ROUNDINGS if "8 bits" not in name or r != "at random"
    ]
    _, watched = run(None, every, 0, options.steps)
    errors = {f"{name}, {r}": mean(watched.errors[name, r]) for name, r in every}
    print("| map, rounding | error of the update |\n|---|---|")
    for name, error in errors.items():
        print(f"| {name} | {error:.3f} |", flush=True)
    print("\n| first moment | nats a byte | minus in full |\n|---|---|---|")
    losses: dict[str, Any] = {}
    kinds = {"in full": None, **{f"power 1.5, {r}": ("power 1.5", r) for r in ROUNDINGS}}
    for name, kept in kinds.items():
        found = [run(kept, [], seed, options.loss_steps)[0] for seed in range(options.seeds)]
        d, half = difference(found, losses["in full"]["losses"] if losses else found)
        losses[name] = {"losses": found, "minus_full": d, "interval_95": half}
        print(f"| {name} | {mean(found):.4f} | {d:+.4f} ± {half:.4f} |", flush=True)
    path = Path(__file__).parent / "results" / "four_bits.json"
    facts = {"steps": options.steps, "loss_steps": options.loss_steps, "lr": LR}
    path.write_text(json.dumps({**facts, "errors": errors, "kinds": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
