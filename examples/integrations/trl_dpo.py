# SPDX-License-Identifier: Apache-2.0
"""Preference optimisation with TRL's DPOTrainer under DeepSpeed: a policy beside its reference.

deepspeed examples/integrations/trl_dpo.py --deepspeed examples/hf_trainer/ds_zero3.json
"""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig
from recipe import SENTENCES, model_and_tokenizer, parser, settings
from trl import DPOConfig, DPOTrainer

from adapprox_ds import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer


def main(argv: list[str] | None = None) -> DPOTrainer:
    """Trains and saves checkpoints; gives back the trainer."""
    arguments = parser(__doc__.splitlines()[0], "runs/trl_dpo")
    arguments.add_argument("--lora", action="store_true", help="train adapters of rank 8 alone")
    args = arguments.parse_args(argv)
    training = DPOConfig(**settings(args), max_length=32)
    model, tokenizer = model_and_tokenizer(args.model)
    # An ending is better as it is than with its words reversed.
    pairs = [
        {"prompt": prompt, "chosen": ending, "rejected": " " + " ".join(ending.split()[::-1])}
        for prompt, ending in SENTENCES
    ]
    rank = 2 if args.lora else 8  # well below the adapters' own, or there is nothing to save
    trainer = DPOTrainer(
        model=model,
        # With adapters the model without them is the reference.
        ref_model=None if args.lora else model_and_tokenizer(args.model)[0],
        args=training,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if args.lora else None,
        callbacks=[CheckOptimizer()],
    )
    # The one line: an argument of SFTTrainer and RewardTrainer, an attribute of every trainer.
    trainer.optimizer_cls_and_kwargs = (
        Adapprox,
        {"lr": args.lr, "rank_max": rank},
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
