# SPDX-License-Identifier: Apache-2.0
"""Adapprox by name in timm and pytorch_optimizer, whose own training scripts then know it.

python examples/integrations/registries.py
"""

from __future__ import annotations

import torch

from adapprox_ds import Adapprox


def register_timm() -> None:
    """Lets ``timm.optim.create_optimizer_v2(model, opt="adapprox")`` make one.

    timm has no public way in: this is the registry that it fills itself (1.0,
    timm/optim/_optim_factory.py).
    """
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    default_registry.register(OptimInfo("adapprox", Adapprox, has_betas=True))


def register_pytorch_optimizer() -> None:
    """Lets ``pytorch_optimizer.create_optimizer(model, "adapprox")`` make one.

    Its table is a public dictionary, of which there is no function that adds to it (4.1,
    pytorch_optimizer/optimizer/__init__.py).
    """
    from pytorch_optimizer.optimizer import OPTIMIZERS

    OPTIMIZERS["adapprox"] = Adapprox


def main() -> None:
    """Makes one by each that is installed, and steps it."""
    makers = {}
    try:
        register_timm()
        from timm.optim import create_optimizer_v2

        makers["timm"] = lambda model: create_optimizer_v2(model, opt="adapprox", lr=1e-3)
    except ImportError as error:
        print(f"timm: {error}")
    try:
        register_pytorch_optimizer()
        from pytorch_optimizer import create_optimizer

        makers["pytorch_optimizer"] = lambda model: create_optimizer(model, "adapprox", lr=1e-3)
    except ImportError as error:
        print(f"pytorch_optimizer: {error}")
    for name, make in makers.items():
        model = torch.nn.Linear(64, 64)
        optimizer = make(model)
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        print(f"{name}: {optimizer.metrics()}")


if __name__ == "__main__":
    main()
