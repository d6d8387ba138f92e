# SPDX-License-Identifier: Apache-2.0
"""Adapprox in ms-swift, given to it by the path of this file.

swift sft ... --external_plugins examples/integrations/swift_adapprox.py --optimizer adapprox
    --optim_args '{"rank_max": 8, "first_moment": "int8"}' --deepspeed zero2
"""

from __future__ import annotations

import json
from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from adapprox_ds import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer


def parsed(text: str | None) -> dict[str, Any]:
    """Of ``--optim_args``: arguments of Adapprox.

    Raises:
        ValueError: it is no JSON object; ms-swift's own optimizers take ``key=value,...`` there.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"--optim_args {text}: has to be arguments of Adapprox as JSON, such as "
            '{"rank_max": 8, "first_moment": "int8"}'
        )
    return found


class AdapproxCallback(OptimizerCallback):
    """Has ms-swift's trainers build Adapprox; groups and their weight decay are the Trainer's."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Adapprox with the learning rate and Adam's numbers of the command line.

        ``--optim_args`` are more arguments of Adapprox, as JSON; they win.
        """
        args = self.args
        settings = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        self.trainer.optimizer_cls_and_kwargs = (Adapprox, settings | parsed(args.optim_args))
        self.trainer.add_callback(CheckOptimizer())
        return super().create_optimizer(model)


optimizers_map["adapprox"] = AdapproxCallback
