# SPDX-License-Identifier: Apache-2.0
"""A plugin for axolotl, named in its YAML; needs axolotl.

.. code-block:: yaml

    plugins: [adapprox_ds.integrations.axolotl.AdapproxPlugin]
    adapprox: {rank_max: 8, first_moment: int8}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer


class AdapproxArgs(BaseModel):
    """Adapprox's key in axolotl's YAML, whose schema drops keys that no plugin claims.

    Attributes:
        adapprox: arguments of :class:`adapprox_ds.Adapprox`, but ``params``; they win over
            axolotl's own ``learning_rate``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``.
    """

    adapprox: dict[str, Any] | None = None


class AdapproxPlugin(BasePlugin):
    """Has axolotl train with Adapprox, whatever its ``optimizer:`` says.

    The optimizer goes in by ``post_trainer_create`` (called in axolotl/train.py,
    ``setup_model_and_trainer``): axolotl 0.19 documents a ``create_optimizer`` of plugins, but its
    trainers never call it (core/trainers/mixins/optimizer.py). Groups, weight decay, ``lr_groups``
    and ``embedding_lr`` are axolotl's.
    """

    def get_input_args(self) -> str:
        """The path of the class of this plugin's keys."""
        return f"{AdapproxArgs.__module__}.{AdapproxArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Makes Adapprox the optimizer that the trainer will build.

        Args:
            cfg: axolotl's configuration.
            trainer: a transformers Trainer that has built no optimizer yet.

        Raises:
            ValueError: ``loraplus_lr_ratio`` is given, for which peft builds the optimizer.
        """
        if cfg.loraplus_lr_ratio is not None:
            raise ValueError(
                f"loraplus_lr_ratio={cfg.loraplus_lr_ratio} does not go with Adapprox: peft builds "
                "the optimizer then; leave it out, or give groups their rates by lr_groups"
            )
        settings: dict[str, Any] = {"lr": trainer.args.learning_rate}
        if cfg.adam_beta1 is not None or cfg.adam_beta2 is not None:
            settings["betas"] = (trainer.args.adam_beta1, trainer.args.adam_beta2)
        if cfg.adam_epsilon is not None:
            settings["eps"] = trainer.args.adam_epsilon
        trainer.optimizer_cls_and_kwargs = (Adapprox, settings | (cfg.adapprox or {}))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The check that Adapprox is what trains."""
        return [CheckOptimizer()]
