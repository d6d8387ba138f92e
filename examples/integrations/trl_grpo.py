# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning with TRL's GRPOTrainer under DeepSpeed; completions by transformers.

deepspeed examples/integrations/trl_grpo.py --deepspeed examples/hf_trainer/ds_zero2.json
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from recipe import SENTENCES, model_and_tokenizer, parser, settings
from trl import GRPOConfig, GRPOTrainer

from adapprox_ds import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer


def variety(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of words that a completion does not repeat."""
    words = [completion.split() for completion in completions]
    return [len(set(part)) / max(len(part), 1) for part in words]


def main(argv: list[str] | None = None) -> GRPOTrainer:
    """Trains and saves checkpoints; gives back the trainer."""
    args = parser(__doc__.splitlines()[0], "runs/trl_grpo").parse_args(argv)
    training = GRPOConfig(**settings(args), num_generations=4, max_completion_length=8)
    model, tokenizer = model_and_tokenizer(args.model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=training,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in SENTENCES]),
        processing_class=tokenizer,
        callbacks=[CheckOptimizer()],
    )
    # The one line: an argument of SFTTrainer and RewardTrainer, an attribute of every trainer.
    trainer.optimizer_cls_and_kwargs = (Adapprox, {"lr": args.lr, "rank_max": 8})
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
