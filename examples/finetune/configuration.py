# SPDX-License-Identifier: Apache-2.0
"""A pretraining's DeepSpeed config, made one of a fine-tuning."""

import copy
from typing import Any

OPTIMIZERS = {"adapprox": "Adapprox", "microadam": "MicroAdam", "adamw": "AdamW"}
SHARED_SETTINGS = ("betas", "eps", "weight_decay")  # what means the same to all
WARMUP_FRACTION = 0.01  # of the steps, as in the paper


def batch_size(config: dict[str, Any], world_size: int) -> int:
    """Sentences a step on all ranks, as DeepSpeed will count them.

    Raises:
        ValueError: The config does not say.
    """
    if "train_batch_size" in config:
        return config["train_batch_size"]
    if "train_micro_batch_size_per_gpu" not in config:
        raise ValueError(
            "the DeepSpeed config needs train_batch_size or train_micro_batch_size_per_gpu"
        )
    accumulation = config.get("gradient_accumulation_steps", 1)
    return config["train_micro_batch_size_per_gpu"] * accumulation * world_size


def finetuning_config(
    config: dict[str, Any], optimizer: str | None, lr: float, steps: int
) -> dict[str, Any]:
    """Replaces what a fine-tuning has of its own: the learning rate and the schedule.

    Args:
        config: As in the JSON.
        optimizer: A key of ``OPTIMIZERS`` to take instead of the config's; of the config's
            settings ``SHARED_SETTINGS`` then stay, unless it is the same optimizer.
        lr: Peak learning rate.
        steps: Of the whole run: a hundredth of linear warm-up, then a cosine.

    Returns:
        A new config.

    Raises:
        ValueError: Neither the config nor the argument names an optimizer.
    """
    config = copy.deepcopy(config)
    block = config.get("optimizer")
    if block is None and optimizer is None:
        raise ValueError('the DeepSpeed config names no "optimizer", and there is no --optimizer')
    name, settings = (block["type"], block.get("params", {})) if block else ("", {})
    wanted = name if optimizer is None else OPTIMIZERS[optimizer]
    if wanted != name:
        settings = {key: settings[key] for key in SHARED_SETTINGS if key in settings}
        if wanted == "AdamW":
            settings["torch_adam"] = True  # otherwise DeepSpeed compiles one
    config["optimizer"] = {"type": wanted, "params": {**settings, "lr": lr}}
    config["scheduler"] = {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": steps,
            "warmup_num_steps": round(WARMUP_FRACTION * steps),
            "warmup_type": "linear",
        },
    }
    return config
