# SPDX-License-Identifier: Apache-2.0
"""A pretrained transformer with a fresh head for two classes, and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

MAX_TOKENS = 128


@dataclass(frozen=True)
class Encoder:
    """What sentences are classified with.

    Attributes:
        model: Takes ``input_ids`` and ``attention_mask``; its ``logits`` are ``(batch, 2)``.
        tokenize: Sentences to token ids, as many as the model takes.
        pad_id: Token id that fills up a batch and is in no sentence.
    """

    model: PreTrainedModel
    tokenize: Callable[[list[str]], list[list[int]]]
    pad_id: int


def load_encoder(folder: Path) -> Encoder:
    """Loads a transformers model, or one that ``examples/pretrain`` left in ``runs/NAME/model``.

    The head's weights come from torch's global generator.
    """
    pieces = folder / "tokenizer.model"
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32
    )
    limit = min(MAX_TOKENS, model.config.max_position_embeddings)
    if not pieces.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return Encoder(
            model,
            lambda texts: tokenizer(texts, truncation=True, max_length=limit)["input_ids"],
            tokenizer.pad_token_id,
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    # Bytes stand in for unknown characters, so <unk> is free; GPT-2 reads the class off the last
    # token that is not it, which is the end-of-document token.
    model.config.pad_token_id = processor.unk_id()

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [[*ids[: limit - 1], processor.eos_id()] for ids in processor.encode(texts)]

    return Encoder(model, tokenize, processor.unk_id())
