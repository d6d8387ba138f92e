# SPDX-License-Identifier: Apache-2.0
"""Arguments that are refused: unknown ones, and torch.optim's that an optimizer cannot honour."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapprox_ds.optim.hyperparameters import FIELD_NAMES
from adapprox_ds.optim.micro_hyperparameters import MICRO_FIELD_NAMES

_KERNELS = "the step has kernels of its own; leave it out"
_BATCHES = "the step takes all blocks in batches; leave it out"
_CLIPPING = 'set "gradient_clipping" in the DeepSpeed config instead'


@dataclass(frozen=True, slots=True)
class Refusals:
    """What one optimizer refuses.

    Attributes:
        owner: the optimizer's name.
        remedies: arguments of torch.optim and DeepSpeed that are refused, with what to do. False
            and None pass.
        allowed: names of the optimizer's own arguments.
    """

    owner: str
    remedies: Mapping[str, str]
    allowed: tuple[str, ...]

    def unknown(self, arguments: Mapping[str, object]) -> None:
        """Raise for arguments that the optimizer does not have.

        Raises:
            ValueError: an argument of torch.optim or DeepSpeed that cannot be honoured; names the
                remedy.
            TypeError: any other name; names the closest known one and all that are allowed.
        """
        for name, value in arguments.items():
            if name in self.remedies:
                if value is None or value is False:
                    continue
                raise ValueError(
                    f"{self.owner}: {name}={value!r} is not supported: {self.remedies[name]}"
                )
            close = difflib.get_close_matches(name, self.allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(
                f"{self.owner}: unknown parameter {name}={value!r}; {hint}allowed: "
                f"{', '.join(self.allowed)}"
            )

    def in_group(self, group: Mapping[str, object]) -> None:
        """Raise for keys of a parameter group that look like settings but would not be honoured.

        Other keys pass: DeepSpeed and schedulers keep their own there.

        Raises:
            ValueError: names the key and the remedy.
        """
        self.unknown({name: value for name, value in group.items() if name in self.remedies})
        if "preset" in group and "preset" in self.allowed:
            raise ValueError(
                f"{self.owner}: preset={group['preset']!r} in a parameter group is not supported: "
                "give it to the constructor, and the group's own settings by name"
            )


ADAPPROX = Refusals(
    "Adapprox",
    {
        "fused": _KERNELS,
        "foreach": _KERNELS,
        "capturable": (
            "a step's ranks are decided on the host, so it cannot be captured in a CUDA graph; "
            "leave it out, and capture forward and backward alone"
        ),
        "differentiable": (
            "factors are not differentiable; use torch.optim.AdamW(differentiable=True)"
        ),
        "amsgrad": "a running maximum has no low-rank form; use torch.optim.AdamW(amsgrad=True)",
        "max_grad_norm": _CLIPPING,
        "rank": "use rank_init, rank_min and rank_max",
    },
    (*FIELD_NAMES, "preset"),
)

MICRO_ADAM = Refusals(
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
        "max_grad_norm": _CLIPPING,
    },
    MICRO_FIELD_NAMES,
)


def refuse_sparse(owner: str, grad: Tensor) -> None:
    """Raise for a gradient that is not strided.

    Raises:
        RuntimeError: names the remedy.
    """
    if grad.is_sparse:
        raise RuntimeError(
            f"{owner}: sparse gradients are not supported; build the embedding with "
            "sparse=False and leave sparse_gradients out of the DeepSpeed config"
        )
