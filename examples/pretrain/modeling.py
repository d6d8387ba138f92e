# SPDX-License-Identifier: Apache-2.0
"""GPT-2 from scratch in the sizes of the Adapprox paper, and one that a CPU trains in minutes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class ModelSize:
    """Shape of a GPT-2.

    Attributes:
        layers: Transformer blocks.
        width: Of the residual stream.
        heads: Attention heads.
        context: Tokens in a window.
        vocab_size: Rows of the embedding, and pieces asked of the tokenizer.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int


SIZES = {
    "tiny": ModelSize(layers=4, width=256, heads=4, context=128, vocab_size=4096),
    "117m": ModelSize(layers=12, width=768, heads=12, context=1024, vocab_size=50257),
    "345m": ModelSize(layers=24, width=1024, heads=16, context=1024, vocab_size=50257),
}


def build_model(size: ModelSize) -> GPT2LMHeadModel:
    """Builds a GPT-2 of the given size with fresh weights from torch's global generator."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=size.layers,
            n_embd=size.width,
            n_head=size.heads,
            n_positions=size.context,
            vocab_size=size.vocab_size,
            # Dropout would tie a resumed run to the state of every rank's generator.
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
    """Next-token cross-entropy in nats, in fp32 whatever the model's dtype.

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
