# SPDX-License-Identifier: Apache-2.0
"""A callback for the Hugging Face Trainer and the trainers made of it; needs transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from adapprox_ds.zero.register import attach


class CheckOptimizer(TrainerCallback):
    """Stops a run in which another optimizer took Adapprox's place, before its first step."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Looks at the optimizer that DeepSpeed was given.

        Raises:
            RuntimeError: it is not Adapprox or MicroAdam; see :func:`adapprox_ds.attach`.
        """
        attach(optimizer)
