# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the fine-tuning example on small sentences. Run by test_finetune_example.py."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel, BertTokenizer

from tests import ROOT

PRAISE = "superb moving witty charming gripping clever lovely brilliant warm dazzling".split()
BLAME = "dull clumsy tedious lifeless awful shallow grim stale witless dreary".split()
SUBJECTS = "film plot cast score ending script hero dialogue story pace camera mood".split()
ADVERBS = "truly rather".split()


def write_sentences(path: Path) -> Path:
    """480 sentences in the form of the real ones, and one that takes no side."""
    lines = ["0\t0.2\tthe film is a film"]
    for words, rating in ((PRAISE, 2.1), (BLAME, -1.7)):
        for subject, adverb, word in itertools.product(SUBJECTS, ADVERBS, words):
            lines.append(f"{len(lines)}\t{rating}\tthe {subject} is {adverb} {word}")
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def write_bert(folder: Path) -> Path:
    """A small BERT with random weights that knows the words."""
    folder.mkdir()
    words = ["the", "is", *SUBJECTS, *ADVERBS, *PRAISE, *BLAME]
    torch.manual_seed(0)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=5 + len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            initializer_range=0.1,
        )
    ).save_pretrained(folder)
    return folder


def arguments(shared: Path, name: str, *others: str) -> list[str]:
    given = ["--encoder", shared / "bert", "--data", shared / "sentences.tsv"]
    given += ["--runs", shared / "runs", "--name", name, "--lr", "2e-3", "--epochs", "3"]
    return [str(argument) for argument in [*given, *others]]


def learns(optimizer: str, config: str, folder: Path, epochs: int = 3) -> None:
    """From chance to nearly all of the held-out sentences."""
    sys.path.insert(0, str(ROOT / "examples" / "finetune"))
    from train import parse_arguments, run

    shared = folder.parent / "shared"
    given = arguments(shared, optimizer, "--optimizer", optimizer, "--epochs", str(epochs))
    sys.argv = ["train.py", "--deepspeed_config", str(ROOT / "ds_configs" / config), *given]
    run(parse_arguments())
    dist.barrier()
    results = json.loads((shared / "runs" / optimizer / "results.json").read_text())
    before, *_, after = results["accuracy_by_epoch"]
    assert before < 0.75
    assert after > 0.95
    assert results["accuracy"] == after
    assert results["held_out_sentences"] + results["training_sentences"] == 480
    assert results["steps"] == epochs * (results["training_sentences"] // 16)
    assert results["optimizer"]["params"]["lr"] == 2e-3


CASES: dict[str, Callable[[Path], None]] = {
    "adapprox": partial(learns, "adapprox", "ds_adapprox.json"),
    # A step moves the largest twentieth of the gradient alone: the small BERT begins slowly.
    "microadam": partial(learns, "microadam", "ds_microadam.json", epochs=6),
    "adamw": partial(learns, "adamw", "ds_adapprox_zero3.json"),
}
