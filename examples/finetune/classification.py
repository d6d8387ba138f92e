# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating a classifier of sentences on all ranks."""

import sys
from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist
import torch
from tqdm import tqdm

from encoders import Encoder
from snippets import Snippet


class TokenizedSnippets:
    """Sentences as tokens, served in batches.

    Args:
        snippets: The sentences.
        encoder: Its tokenizer.
    """

    def __init__(self, snippets: list[Snippet], encoder: Encoder) -> None:
        self._ids = encoder.tokenize([snippet.text for snippet in snippets])
        self._labels = [snippet.label for snippet in snippets]
        self._pad_id = encoder.pad_id

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self._ids)

    def batch(
        self, indices: list[int], device: torch.device
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pads the sentences at ``indices`` to the longest of them.

        Returns:
            The model's arguments, each ``(len(indices), T)``, and the labels.
        """
        rows = [torch.tensor(self._ids[index]) for index in indices]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        labels = torch.tensor([self._labels[index] for index in indices])
        arguments = {"input_ids": inputs.to(device), "attention_mask": mask.to(device)}
        return arguments, labels.to(device)


def train_epoch(engine: Any, data: TokenizedSnippets, epoch: int, seed: int) -> float:
    """Trains on every sentence once, but the rest that fills no batch; a collective call.

    Returns:
        The mean loss in nats, over all ranks.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(data), generator=generator).tolist()
    accumulation = engine.gradient_accumulation_steps()
    steps = len(data) // engine.train_batch_size()
    loss_sum = torch.zeros((), device=engine.device)
    bar = tqdm(
        total=steps,
        desc=f"epoch {epoch + 1}",
        unit="step",
        disable=dist.get_rank() > 0,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
    for indices in _shares(engine, order, steps * accumulation):
        inputs, labels = data.batch(indices, engine.device)
        # In fp32 whatever the model's dtype.
        loss = torch.nn.functional.cross_entropy(engine(**inputs).logits.float(), labels)
        engine.backward(loss)
        bar.update(int(engine.is_gradient_accumulation_boundary()))
        engine.step()
        loss_sum += loss.detach()
    bar.close()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / (steps * accumulation * dist.get_world_size())


@torch.no_grad()
def evaluate(engine: Any, data: TokenizedSnippets) -> float:
    """Part of all sentences whose class is found; a collective call."""
    size = dist.get_world_size() * engine.train_micro_batch_size_per_gpu()
    micro_batches = -(-len(data) // size)
    # ZeRO-3 needs the same number of forwards on every rank: the last ones are of sentences
    # that do not count.
    order = [*range(len(data)), *[-1] * (micro_batches * size - len(data))]
    correct = torch.zeros((), device=engine.device)
    engine.eval()
    for indices in _shares(engine, order, micro_batches):
        inputs, labels = data.batch(indices, engine.device)
        counts = torch.tensor(indices, device=engine.device) >= 0
        correct += ((engine(**inputs).logits.argmax(-1) == labels) & counts).sum()
    engine.train()
    dist.all_reduce(correct)
    return correct.item() / len(data)


def _shares(engine: Any, order: list[int], micro_batches: int) -> Iterator[list[int]]:
    """This rank's indices of each micro-batch."""
    size = engine.train_micro_batch_size_per_gpu()
    for micro in range(micro_batches):
        start = (micro * dist.get_world_size() + dist.get_rank()) * size
        yield order[start : start + size]
