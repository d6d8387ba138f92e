# SPDX-License-Identifier: Apache-2.0
"""What a model is trained with where the DeepSpeed config leaves it open."""

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Batch and schedule of a run: linear warm-up, then a cosine.

    Attributes:
        batch: Windows a step, all ranks together.
        steps: Of the schedule.
        warmup: Steps from 0 to the peak.
        peak_lr: Highest learning rate.
        least_lr: Learning rate of the last step.
    """

    batch: int
    steps: int
    warmup: int
    peak_lr: float
    least_lr: float


# The large ones are those of section 4 of the paper; bert-base has what it gives for BERT 345M.
RECIPES = {
    "tiny": Recipe(batch=16, steps=500, warmup=50, peak_lr=2e-3, least_lr=2e-4),
    "gpt2-117m": Recipe(batch=128, steps=100_000, warmup=1_000, peak_lr=3e-4, least_lr=5e-5),
    "gpt2-345m": Recipe(batch=128, steps=100_000, warmup=1_000, peak_lr=3e-4, least_lr=3e-5),
    "bert-tiny": Recipe(batch=16, steps=1_000, warmup=100, peak_lr=1e-3, least_lr=1e-4),
    "bert-base": Recipe(batch=128, steps=200_000, warmup=2_000, peak_lr=2e-4, least_lr=2e-5),
}


def complete(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Fills in what a DeepSpeed config leaves open; what it says stays.

    Args:
        config: As in the JSON.
        recipe: Gives ``train_batch_size`` where the config has neither that nor
            ``gradient_accumulation_steps``, the optimizer's ``lr`` where it has neither that nor
            a ``preset``, and the ``scheduler`` where there is none.

    Returns:
        A new config.
    """
    config = copy.deepcopy(config)
    if "gradient_accumulation_steps" not in config:
        config.setdefault("train_batch_size", recipe.batch)
    parameters = config["optimizer"].setdefault("params", {})
    if "preset" not in parameters:
        parameters.setdefault("lr", recipe.peak_lr)
    config.setdefault(
        "scheduler",
        {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": recipe.steps,
                "warmup_num_steps": recipe.warmup,
                "warmup_type": "linear",
                "cos_min_ratio": recipe.least_lr / recipe.peak_lr,
            },
        },
    )
    return config
