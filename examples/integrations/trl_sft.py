# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with TRL's SFTTrainer under DeepSpeed, of all weights or of adapters.

deepspeed examples/integrations/trl_sft.py --deepspeed examples/hf_trainer/ds_zero2.json --lora
"""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig
from recipe import SENTENCES, model_and_tokenizer, parser, settings
from trl import SFTConfig, SFTTrainer

from adapprox_ds import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer


def main(argv: list[str] | None = None) -> SFTTrainer:
    """Trains and saves checkpoints; gives back the trainer."""
    arguments = parser(__doc__.splitlines()[0], "runs/trl_sft")
    arguments.add_argument("--lora", action="store_true", help="train adapters of rank 8 alone")
    args = arguments.parse_args(argv)
    training = SFTConfig(**settings(args), max_length=32, weight_decay=0.1)
    model, tokenizer = model_and_tokenizer(args.model)
    rank = 2 if args.lora else 8  # well below the adapters' own, or there is nothing to save
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_list([{"text": "".join(sentence)} for sentence in SENTENCES]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if args.lora else None,
        # The one line. Its lr counts: learning_rate of SFTConfig is not passed on.
        optimizer_cls_and_kwargs=(Adapprox, {"lr": args.lr, "rank_max": rank}),
        callbacks=[CheckOptimizer()],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
