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
        more = json.loads(args.optim_args or "{}")
        self.trainer.optimizer_cls_and_kwargs = (Adapprox, settings | more)
        self.trainer.add_callback(CheckOptimizer())
        return super().create_optimizer(model)


optimizers_map["adapprox"] = AdapproxCallback
