# SPDX-License-Identifier: Apache-2.0
"""Every knob of MicroAdam: its range, its default, its source."""

from __future__ import annotations

from dataclasses import dataclass

from adapprox_ds.core.refusals import CLIPPING, Refusals
from adapprox_ds.core.rules import (
    FLAG,
    FRACTION,
    NON_NEGATIVE,
    NONFINITE,
    WEIGHT_ROUNDINGS,
    GroupSettings,
    at_least,
    is_int,
    is_number,
    setting,
)
from adapprox_ds.micro_adam.feedback import BITS
from adapprox_ds.micro_adam.grid import MAX_BLOCK, Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroHyperparameters(GroupSettings):
    """The validated settings of one parameter group; :class:`MicroAdam` says what each does.

    "authors' package" is ista-daslab-optimizers, from version 1.1 on.
    """

    owner = "MicroAdam"

    eps: float = setting(
        1e-8, ("a finite number > 0", lambda v: NON_NEGATIVE[1](v) and v > 0.0), "AdamW"
    )
    window: int = setting(10, at_least(1), "paper")
    density: float = setting(
        0.01, ("a number in (0, 1]", lambda v: is_number(v) and 0.0 < v <= 1.0), "paper"
    )
    block_size: int = setting(
        4096,
        (
            f"an integer from 2 to {MAX_BLOCK}, a multiple of quant_block_size",
            lambda v: is_int(v) and 2 <= v <= MAX_BLOCK,
        ),
        "this package",
    )
    quant_bits: int = setting(4, (f"one of {BITS}", lambda v: is_int(v) and v in BITS), "paper")
    quant_block_size: int = setting(
        128,
        (
            f"an even integer from 2 to {MAX_BLOCK}",
            lambda v: is_int(v) and v % 2 == 0 and 2 <= v <= MAX_BLOCK,
        ),
        "this package",
    )
    alpha: float = setting(0.0, FRACTION, "paper; the setting is of the authors' package")
    weight_rounding: str = setting("stochastic", WEIGHT_ROUNDINGS, "measured")
    maximize: bool = setting(False, FLAG, "AdamW")
    nonfinite: str | None = setting(None, NONFINITE, "DeepSpeed")

    def _joint_rules(self) -> tuple[tuple[str, str, bool], ...]:
        return (
            (
                "block_size",
                f"a multiple of quant_block_size, here {self.quant_block_size}",
                self.block_size % self.quant_block_size == 0,
            ),
            (
                "alpha",
                "0 where density is 1, since the window then takes all, and no error is left to "
                "apply a part of",
                not self.alpha or self.density != 1,
            ),
        )

    @property
    def grid(self) -> Grid:
        """The cut of parameters into blocks."""
        return Grid(self.block_size, self.quant_block_size)


MICRO_FIELD_NAMES = MicroHyperparameters.names()

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
