# SPDX-License-Identifier: Apache-2.0
"""Arguments that Adapprox does not have: unknown ones, and torch.optim's that it cannot honour."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from adapprox_ds.optim.hyperparameters import FIELD_NAMES

#: torch.optim and DeepSpeed arguments that are refused, with the remedy. False and None pass.
_REFUSED: Mapping[str, str] = {
    "fused": "the step has kernels of its own; leave it out",
    "foreach": "the step has kernels of its own; leave it out",
    "capturable": (
        "a step's ranks are decided on the host, so it cannot be captured in a CUDA graph; "
        "leave it out, and capture forward and backward alone"
    ),
    "differentiable": "factors are not differentiable; use torch.optim.AdamW(differentiable=True)",
    "amsgrad": "a running maximum has no low-rank form; use torch.optim.AdamW(amsgrad=True)",
    "max_grad_norm": 'set "gradient_clipping" in the DeepSpeed config instead',
    "rank": "use rank_init, rank_min and rank_max",
}


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Raise for arguments that Adapprox does not have.

    Raises:
        ValueError: an argument of torch.optim or DeepSpeed that cannot be honoured; names the
            remedy.
        TypeError: any other name; names the closest known one and all that are allowed.
    """
    for name, value in unknown.items():
        if name in _REFUSED:
            if value is None or value is False:
                continue
            raise ValueError(f"Adapprox: {name}={value!r} is not supported: {_REFUSED[name]}")
        allowed = (*FIELD_NAMES, "preset")
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise TypeError(
            f"Adapprox: unknown parameter {name}={value!r}; {hint}allowed: {', '.join(allowed)}"
        )


def refuse_in_group(group: Mapping[str, Any]) -> None:
    """Raise for keys of a parameter group that look like settings but would not be honoured.

    Other keys pass: DeepSpeed and schedulers keep their own there.

    Raises:
        ValueError: names the key and the remedy.
    """
    refuse_unknown({name: value for name, value in group.items() if name in _REFUSED})
    if "preset" in group:
        raise ValueError(
            f"Adapprox: preset={group['preset']!r} in a parameter group is not supported: give it "
            "to the constructor, and the group's own settings by name"
        )
