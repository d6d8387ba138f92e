# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory's v1 with Adapprox among its optimizers.

torchrun --nproc-per-node 2 examples/integrations/llamafactory_v1.py sft config.yaml
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.launcher import main
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

from adapprox_ds import Adapprox


@OptimizerPlugin("adapprox").register()
def adapprox(model: Any, optim_config: dict[str, Any]) -> Adapprox:
    """What ``optim_config: {name: adapprox, lr: 1.0e-3, ...}`` stands for.

    Every key beside ``name`` is an argument of Adapprox; ``learning_rate`` is not passed to
    optimizers of the registry. Biases and norms do not decay.

    Raises:
        ValueError: ``lr`` is missing.
    """
    if "lr" not in optim_config:
        raise ValueError(
            "optim_config has no lr, and learning_rate is not passed to it: add lr: 1.0e-3 or so"
        )
    settings = {key: value for key, value in optim_config.items() if key != "name"}
    members = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in members if p.ndim > 1]},
        {"params": [(name, p) for name, p in members if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Adapprox([group for group in groups if group["params"]], **settings)


if __name__ == "__main__":
    main()
