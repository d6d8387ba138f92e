# SPDX-License-Identifier: Apache-2.0
"""The optimizers that Adapprox is compared with, each made from named parameters and a rate.

NAdamW, which is here in full, is AdamW that looks ahead as Adapprox does, with a dense second
moment: the control that tells what the low rank costs. torch's ``NAdam`` is something else: it
schedules the momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Adafactor

DECAY = 0.1
#: Named parameters and the learning rate -> an optimizer.
Build = Callable[[list, float], torch.optim.Optimizer]


class NAdamW(torch.optim.Optimizer):
    """W <- (1 - lr decay) W - lr N / (sqrt(V / (1 - beta2^t)) + eps).

    N = (beta1 M + (1 - beta1) G) / (1 - beta1^(t + 1)), with M and V Adam's moments after G.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        betas: decay of the moments.
        eps: added to the root.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, of every parameter with a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                ahead = m.lerp(p.grad, 1 - beta1).div_(1 - beta1 ** (t + 1))
                root = v.div(1 - beta2**t).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(ahead, root, value=-group["lr"])


def adafactor(params: list, lr: float, beta1: float = 0.9) -> torch.optim.Optimizer:
    """transformers', with the learning rate that it is given, as the others."""
    return Adafactor(
        [p for _, p in params],
        lr=lr,
        beta1=beta1 or None,
        weight_decay=DECAY,
        scale_parameter=False,
        relative_step=False,
    )


def came(params: list, lr: float, beta1: float = 0.9) -> torch.optim.Optimizer:
    """pytorch_optimizer's."""
    return _of("pytorch_optimizer", "CAME", params, lr, betas=(beta1, 0.999, 0.9999))


def between_layers(params: list) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices that are no embedding, and the other parameters."""
    matrices = [p for n, p in params if p.ndim == 2 and "wte" not in n and "wpe" not in n]
    return matrices, [p for _, p in params if all(p is not q for q in matrices)]


def galore(params: list, lr: float) -> torch.optim.Optimizer:
    """pytorch_optimizer's, at rank 8 for matrices between layers; its AdamW for the others.

    New directions every 50 steps and a scale of 1 are that package's defaults. Its authors' 200 and
    0.25 end the 400 steps of losses.py higher: at a rate of 8e-3 with 2.37 nats a byte instead of
    2.24, at 1.6e-2 with 2.35.
    """
    matrices, others = between_layers(params)
    projected = {"params": matrices, "rank": 8, "update_proj_gap": 50, "scale": 1.0}
    projected["projection_type"] = "std"
    build = import_module("pytorch_optimizer").GaLore
    built: torch.optim.Optimizer = build([projected, {"params": others}], lr, weight_decay=DECAY)
    return built


def muon(params: list, lr: float) -> torch.optim.Optimizer:
    """torch's for matrices between layers, scaled to AdamW's rates; AdamW for the others."""
    matrices, others = between_layers(params)
    of_matrices = torch.optim.Muon(matrices, lr, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return _Both([of_matrices, torch.optim.AdamW(others, lr, weight_decay=DECAY)])


class _Both(torch.optim.Optimizer):
    """Several optimizers as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """Of all parts."""
        return {p: held for part in self.parts for p, held in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """The base class begins with an empty one; the parts have theirs."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts:
            part.step()


def _of(module: str, name: str, params: list, lr: float, **knobs: Any) -> torch.optim.Optimizer:
    build = getattr(import_module(module), name)
    built: torch.optim.Optimizer = build([p for _, p in params], lr=lr, weight_decay=DECAY, **knobs)
    return built


def adam_mini(params: list, lr: float) -> torch.optim.Optimizer:
    """The authors', which asks for the width and the heads of a GPT-2."""
    build = import_module("adam_mini").Adam_mini
    width = params[0][1].shape[-1]
    heads = {"dim": width, "n_heads": max(4, width // 64)}
    built: torch.optim.Optimizer = build(params, lr=lr, weight_decay=DECAY, verbose=False, **heads)
    return built


#: In the order of the tables.
PEERS: dict[str, Build] = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=DECAY),
    "NAdamW": lambda params, lr: NAdamW([p for _, p in params], lr, weight_decay=DECAY),
    "Adafactor": adafactor,
    "CAME": came,
    "AdamW8bit": lambda params, lr: _of("torchao.optim", "AdamW8bit", params, lr),
    "Muon": muon,
    "SOAP": lambda params, lr: _of("pytorch_optimizer", "SOAP", params, lr),
    "GaLore": galore,
    "Adam-mini": adam_mini,
    "Lion": lambda params, lr: _of("pytorch_optimizer", "Lion", params, lr),
}
#: The packages of those that need one beside torch and transformers.
NEEDS = {"CAME": "pytorch_optimizer", "SOAP": "pytorch_optimizer", "Lion": "pytorch_optimizer"}
NEEDS |= {"GaLore": "pytorch_optimizer", "AdamW8bit": "torchao", "Adam-mini": "adam_mini"}


def installed(names: Sequence[str]) -> list[str]:
    """Those of the optimizers that can be run; says which cannot."""
    missing = [n for n in names if n in NEEDS and find_spec(NEEDS[n]) is None]
    for name in missing:
        print(f"{name}: not run, {NEEDS[name]} is not installed")
    return [name for name in names if name not in missing]
