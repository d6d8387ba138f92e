# SPDX-License-Identifier: Apache-2.0
"""What the recipes of TRL share: settings, and a model and sentences that need no download."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from deepspeed.accelerator import get_accelerator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)

SUBJECTS = ("the dog", "a bird", "the old man", "my sister", "one child", "the river")
VERBS = ("finds", "sees", "follows", "forgets", "likes", "hears")
OBJECTS = ("the house", "a red car", "some bread", "the sea", "two stones", "the way home")
#: (prompt, ending) of each sentence, in an order in which neighbours differ.
SENTENCES = [
    (f"{SUBJECTS[i % 6]} {VERBS[i // 6]}", f" {OBJECTS[(i + i // 6) % 6]} .") for i in range(36)
]


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """The command line that the recipes have in common."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--deepspeed", required=True, help="DeepSpeed config, a JSON")
    made.add_argument("--model", help="name or folder, instead of a tiny GPT-2 of random weights")
    made.add_argument("--output", type=Path, default=Path(output))
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--save-steps", type=int, default=10, help="steps a checkpoint")
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    made.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return made


def model_and_tokenizer(name: str | None) -> tuple[Any, Any]:
    """The model of that name; without one a GPT-2 of random weights that knows ``SENTENCES``."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = words(prompt + ending for prompt, ending in SENTENCES)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(0)
    return GPT2LMHeadModel(config), tokenizer


def words(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    made = Tokenizer(WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.train_from_iterator(texts, WordLevelTrainer(special_tokens=["<unk>", "<eos>", "<pad>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What TRL's configs get alike."""
    return {
        "output_dir": str(args.output),
        "deepspeed": args.deepspeed,
        "accelerator_config": accelerator_config(),
        "bf16": torch.cuda.is_available(),  # TRL's default is True
        "max_steps": args.steps,
        "save_steps": args.save_steps,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
    }


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
