# SPDX-License-Identifier: Apache-2.0
"""GPT-2 and BERT from scratch, in the paper's sizes and in ones that a CPU trains in minutes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel


@dataclass(frozen=True)
class ModelSize:
    """Shape of a transformer.

    Attributes:
        layers: Transformer blocks.
        width: Of the residual stream.
        heads: Attention heads.
        context: Tokens in a window.
        vocab_size: Rows of the embedding.
        masked: A BERT, which predicts masked tokens; otherwise a GPT-2, which predicts the next.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int
    masked: bool = False

    @property
    def pieces(self) -> int:
        """Pieces asked of the tokenizer: all rows, but the one of BERT's mask."""
        return self.vocab_size - self.masked

    @property
    def mask_id(self) -> int:
        """Row of BERT's mask, the last one."""
        return self.vocab_size - 1


SIZES = {
    "tiny": ModelSize(layers=4, width=256, heads=4, context=128, vocab_size=4096),
    "gpt2-117m": ModelSize(layers=12, width=768, heads=12, context=1024, vocab_size=50257),
    "gpt2-345m": ModelSize(layers=24, width=1024, heads=16, context=1024, vocab_size=50257),
    "bert-tiny": ModelSize(layers=4, width=256, heads=4, context=128, vocab_size=4096, masked=True),
    "bert-base": ModelSize(
        layers=12, width=768, heads=12, context=512, vocab_size=30522, masked=True
    ),
}


def build_model(size: ModelSize) -> PreTrainedModel:
    """Builds a model of the given size with fresh weights from torch's global generator.

    Without dropout, which would tie a resumed run to the state of every rank's generator.
    """
    if size.masked:
        return BertForMaskedLM(
            BertConfig(
                num_hidden_layers=size.layers,
                hidden_size=size.width,
                intermediate_size=4 * size.width,
                num_attention_heads=size.heads,
                max_position_embeddings=size.context,
                vocab_size=size.vocab_size,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=None,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=size.layers,
            n_embd=size.width,
            n_head=size.heads,
            n_positions=size.context,
            vocab_size=size.vocab_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Splits the parameters in two groups: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of the targets in nats, in fp32 whatever the model's dtype.

    Args:
        logits: ``(batch, T, vocabulary)``.
        targets: ``(batch, T)``; negative entries are left out.
        reduction: As in ``torch.nn.functional.cross_entropy``.
    """
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction=reduction
    )


def count_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Trainable elements, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
