# SPDX-License-Identifier: Apache-2.0
"""A model whose gradients are known exactly, whatever DeepSpeed does to get them to the optimizer.

The loss is the sum of parameter times coefficient, so each coefficient is a gradient. Coefficients
are small integers over 32: sums, means over ranks and loss scales are exact in bf16 and fp16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.micro_adam.micro_oracle import untied
from tests.world import release_of

SHAPES: dict[str, tuple[int, ...]] = {
    "emb": (37, 10),
    "norm": (10,),
    "w1": (24, 16),
    "b1": (17,),
    "conv": (6, 4, 3, 3),
    "experts": (3, 7, 9),
    "frozen": (8, 8),
    "w2": (16, 9),
    "unused": (13, 7),
    "empty": (0,),
}
if release_of("deepspeed") < (0, 19, 8):
    # ZeRO-1/2 links it to a part of the shard and asserts that there is one.
    del SHAPES["empty"]


class Cell(nn.Module):
    """One parameter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, coefficient: Tensor) -> Tensor:
        return (self.weight * coefficient.to(self.weight.dtype)).sum()


def start_value(name: str) -> Tensor:
    """The parameter's initial value, exact in bf16 and fp16 and different at every element."""
    index = list(SHAPES).index(name)
    n = math.prod(SHAPES[name])
    generator = torch.Generator().manual_seed(17 + index)
    return (torch.randint(-127, 128, (n,), generator=generator) / 64.0).reshape(SHAPES[name])


def coefficient(name: str, step: int) -> Tensor:
    """The gradient of parameter ``name`` at ``step``; its scale varies over rows and steps."""
    index = list(SHAPES).index(name)
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1000 * (index + 1) + step)
    values = torch.randint(-7, 8, shape, generator=generator) / 32.0
    if shape and shape[0]:
        rows = torch.tensor([1.0, 2.0, 4.0])[torch.arange(shape[0]) % 3]
        values = values * rows.reshape(-1, *[1] * (len(shape) - 1))
    return values * (2.0 if step % 3 == 1 else 1.0)


def untied_coefficient(name: str, step: int) -> Tensor:
    """Another gradient, of which Top-K takes the same whatever it does with equal ones."""
    index = list(SHAPES).index(name)
    return untied(SHAPES[name], 1000 * (index + 1) + step) * (2.0 if step % 3 == 1 else 1.0)


class KnownGradients(nn.Module):
    """Frozen, tied, unused and empty parameters beside ordinary ones.

    Attributes:
        coefficient: of a parameter's name and a step; the gradients.
    """

    coefficient = staticmethod(coefficient)

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleDict({name: Cell(shape) for name, shape in SHAPES.items()})
        self.tied = self.cells["w1"]
        self.cells["frozen"].weight.requires_grad_(False)

    def set_start_values(self) -> None:
        """Give every parameter its start value (all of it must be in memory)."""
        with torch.no_grad():
            for name, cell in self.cells.items():
                cell.weight.copy_(start_value(name))

    def forward(self, step: int, factor: float) -> Tensor:
        """Loss whose gradients are ``factor * coefficient``; "w1" gets it in two halves (tied)."""
        total = torch.zeros(())
        for name, cell in self.cells.items():
            if name in ("unused", "empty"):
                continue
            c = factor * self.coefficient(name, step)
            if name == "w1":
                total = total + self.tied(c * 0.5) + cell(c * 0.5)
            else:
                total = total + cell(c)
        return total


def trainable(model: KnownGradients) -> dict[str, nn.Parameter]:
    """Name -> parameter of what an optimizer should change."""
    named = {name: cell.weight for name, cell in model.cells.items()}
    return {name: p for name, p in named.items() if p.requires_grad and SHAPES[name] != (0,)}
