# SPDX-License-Identifier: Apache-2.0
"""Every knob of MicroAdam: its range, its default, its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from adapprox_ds.core.refusals import CLIPPING, Refusals
from adapprox_ds.core.rules import (
    BETAS,
    FLAG,
    NON_NEGATIVE,
    NONFINITE_RULE,
    RATE,
    WEIGHT_ROUNDINGS,
    Rule,
    is_int,
    is_number,
    require,
)
from adapprox_ds.micro_adam.feedback import BITS
from adapprox_ds.micro_adam.grid import Grid

#: Places in a block are kept in 16 bits with a sign.
MAX_BLOCK = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroHyperparameters:
    """The validated settings of one parameter group.

    Defaults of ``lr``, ``betas``, ``eps`` and ``weight_decay`` are those of ``torch.optim.AdamW``;
    ``window``, ``density`` and ``quant_bits`` are the paper's. The paper has no ``alpha``: it is of
    the authors' package, ista-daslab-optimizers, from version 1.1 on.

    Attributes:
        lr: learning rate; a float, or a one-element tensor read at every step.
        betas: (beta_1, beta_2), decay of the first and the second moment over the window.
        eps: added to the root of the second moment; where the window holds nothing the moments are
            0, so that it cannot be.
        weight_decay: decoupled.
        window: m, the steps whose gradients the moments are made of.
        density: the part of a block's elements that a step moves to the window.
        block_size: elements of a block, of which a step takes the largest. Blocks are counted from
            each parameter's first element.
        quant_bits: how the error is kept: 4 bits an element, or 32 for in full.
        quant_block_size: elements whose 4-bit codes share a minimum and a maximum.
        alpha: the part of the error that a step leaves which moves the weights in that step, by
            -lr alpha e, and is then forgotten: (1 - alpha) e is kept. 0 for Algorithm 1 of the
            paper, which keeps all of it.
        weight_rounding: how weights in bf16 or fp16 are written; see :class:`Hyperparameters`.
        maximize: ascend instead of descend.
        nonfinite: what NaN, infinite and too large (beyond 1.8e19) gradients do: "raise" an error
            that names them, "skip" the step, both with all of it left as it was; or "propagate".
            None for "propagate" where the DeepSpeed config says ``"bf16": {"check_grad_overflow":
            false}``, which asks not to be stopped by them, else "raise".
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    window: int = 10
    density: float = 0.01
    block_size: int = 4096
    quant_bits: int = 4
    quant_block_size: int = 128
    alpha: float = 0.0
    weight_rounding: str = "stochastic"
    maximize: bool = False
    nonfinite: str | None = None

    def __post_init__(self) -> None:
        require("MicroAdam", self, _RULES)
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.block_size % self.quant_block_size:
            raise ValueError(
                f"MicroAdam: block_size={self.block_size!r} is not allowed; allowed: a multiple of "
                f"quant_block_size, here {self.quant_block_size}"
            )
        if self.alpha and self.density == 1:
            raise ValueError(
                f"MicroAdam: alpha={self.alpha!r} is not allowed; allowed: 0 where density is 1, "
                "since the window then takes all, and no error is left to apply a part of"
            )

    @property
    def learning_rate(self) -> float:
        """``lr`` as a number; a tensor on a device is waited for."""
        return float(self.lr)

    @property
    def grid(self) -> Grid:
        """The cut of parameters into blocks."""
        return Grid(self.block_size, self.quant_block_size)

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> MicroHyperparameters:
        """The settings held in a parameter group, validated: schedulers may have changed them."""
        return cls(**{name: group[name] for name in MICRO_FIELD_NAMES})

    def as_group(self) -> dict[str, Any]:
        """The settings as a parameter group holds them."""
        return {name: getattr(self, name) for name in MICRO_FIELD_NAMES}


MICRO_FIELD_NAMES: tuple[str, ...] = tuple(f.name for f in fields(MicroHyperparameters))

_RULES: Mapping[str, Rule] = {
    "lr": RATE,
    "betas": BETAS,
    "eps": ("a finite number > 0", lambda v: NON_NEGATIVE[1](v) and v > 0.0),
    "weight_decay": NON_NEGATIVE,
    "window": ("an integer >= 1", lambda v: is_int(v) and v >= 1),
    "density": ("a number in (0, 1]", lambda v: is_number(v) and 0.0 < v <= 1.0),
    "quant_block_size": (
        f"an even integer from 2 to {MAX_BLOCK}",
        lambda v: is_int(v) and v % 2 == 0 and 2 <= v <= MAX_BLOCK,
    ),
    "block_size": (
        f"an integer from 2 to {MAX_BLOCK}, a multiple of quant_block_size",
        lambda v: is_int(v) and 2 <= v <= MAX_BLOCK,
    ),
    "quant_bits": (f"one of {BITS}", lambda v: is_int(v) and v in BITS),
    "alpha": ("a number in [0, 1)", lambda v: is_number(v) and 0.0 <= v < 1.0),
    "weight_rounding": (f"one of {WEIGHT_ROUNDINGS}", lambda v: v in WEIGHT_ROUNDINGS),
    "maximize": FLAG,
    "nonfinite": NONFINITE_RULE,
}

_BATCHES = "the step takes all blocks in batches; leave it out"

#: The arguments that the constructor refuses.
REFUSALS = Refusals(
    "MicroAdam",
    {
        "fused": _BATCHES,
        "foreach": _BATCHES,
        "capturable": (
            "the row of the window that a step writes is chosen on the host, so it cannot be "
            "captured in a CUDA graph; leave it out, and capture forward and backward alone"
        ),
        "differentiable": (
            "choosing entries is not differentiable; use torch.optim.AdamW(differentiable=True)"
        ),
        "amsgrad": (
            "a running maximum needs a dense second moment; use torch.optim.AdamW(amsgrad=True)"
        ),
        "max_grad_norm": CLIPPING,
    },
    MICRO_FIELD_NAMES,
)
