# SPDX-License-Identifier: Apache-2.0
"""The pretraining example: its corpus, its entropy, its data order, its command line."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

import corpus as corpus_module
from adapprox_ds import MicroAdam
from corpus import (
    Document,
    encode,
    load_corpus,
    load_documents,
    prepare_corpus,
    split_documents,
    train_tokenizer,
    unigram_cross_entropy,
)
from recording import MetricsRow, RankRow, RunRecorder
from sampling import WindowSampler
from telemetry import state_bytes


def write_corpus(folder: Path, documents: int = 24, words: int = 900) -> Path:
    """Makes a folder of documents of random words, each with one word of its own."""
    chooser = random.Random(0)
    lexicon = ["".join(chooser.choices("etaoinshrdlu", k=chooser.randint(2, 7))) for _ in range(90)]
    folder.mkdir()
    for index in range(documents):
        text = " ".join(chooser.choices(lexicon, k=words)) + f" {own_word(index)}" * 40
        (folder / f"{index:02}.txt").write_text(text)
    return folder


def own_word(index: int) -> str:
    return chr(ord("A") + index) * 3


def test_split_holds_out_whole_documents_at_random() -> None:
    documents = [Document(str(index), "") for index in range(200)]
    train, held_out = split_documents(documents, seed=0)
    assert len(held_out) == 10
    assert sorted(train + held_out, key=lambda d: int(d.name)) == documents
    assert (train, held_out) == split_documents(documents, seed=0)
    assert held_out != split_documents(documents, seed=1)[1]
    assert held_out != documents[-10:]
    assert len(split_documents(documents[:2], seed=0)[1]) == 1


def test_tokenizer_round_trips_what_it_never_saw() -> None:
    text = "the war and the peace and the trade of the nation " * 50
    model = train_tokenizer([Document("a", text)], vocab_size=4096)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size() < 4096  # all that so little text gives, and no error
    unseen = "Ω the  nation\n\n  of £"
    ids = tokenizer.encode(unseen)
    assert tokenizer.decode(ids) == unseen
    assert tokenizer.unk_id() not in ids
    stream = encode(tokenizer, [Document("a", "the"), Document("b", "war")])
    assert (stream == corpus_module.END_OF_DOCUMENT).sum() == 2


def test_tokenizer_does_not_see_the_held_out_documents(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    prepared = prepare_corpus(tmp_path / "cache", folder, vocab_size=1024, seed=0)
    held_out = json.loads((prepared / "about.json").read_text())["held_out_documents"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    for index in range(24):
        seen = len(tokenizer.encode(f" {own_word(index)}", out_type=str)) < 3
        assert seen == (f"{index:02}.txt" not in held_out)


def test_unigram_cross_entropy() -> None:
    uniform = torch.arange(8).repeat(1000)
    assert unigram_cross_entropy(uniform, torch.tensor([3, 5]), 8) == pytest.approx(math.log(8))
    # Counts 3, 1, 0 become 4/7, 2/7, 1/7.
    train, held_out = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 2])
    expected = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    assert unigram_cross_entropy(train, held_out, 3) == pytest.approx(expected)


def test_prepared_corpus_is_cached_by_content(tmp_path: Path) -> None:
    folder, cache = write_corpus(tmp_path / "text"), tmp_path / "cache"
    first = prepare_corpus(cache, folder, vocab_size=1024, seed=0)
    stamp = (first / "tokens.pt").stat().st_mtime_ns
    assert prepare_corpus(cache, folder, vocab_size=1024, seed=0) == first
    assert (first / "tokens.pt").stat().st_mtime_ns == stamp
    assert prepare_corpus(cache, folder, vocab_size=1024, seed=1) != first
    (folder / "00.txt").write_text("another text")
    assert prepare_corpus(cache, folder, vocab_size=1024, seed=0) != first
    corpus = load_corpus(first)
    assert int(corpus.train.max()) < corpus.vocab_size
    assert 0 < corpus.unigram_nats < math.log(corpus.vocab_size)


def test_embedded_slice_stands_in_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    documents, source = load_documents()
    assert len(documents) == 42
    assert sum(len(document.text.encode()) for document in documents) == 980_715
    assert "not installed" in source


def test_empty_corpus_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="at least two"):
        load_documents(tmp_path)


def test_sampler_serves_each_window_once_an_epoch_and_from_its_position_alone() -> None:
    sampler = WindowSampler(torch.arange(101), length=10, seed=0)
    assert len(sampler) == 10
    inputs, targets = sampler.batch(0, 10)
    assert torch.equal(inputs.sort(0).values.flatten(), torch.arange(100))
    assert torch.equal(targets, inputs + 1)
    second, _ = sampler.batch(10, 10)
    assert not torch.equal(inputs, second)
    resumed = WindowSampler(torch.arange(101), length=10, seed=0)
    assert torch.equal(resumed.batch(10, 10)[0], second)
    # Two ranks of 5 see what one of 10 sees, also across an epoch's edge.
    halves = torch.cat([resumed.batch(7, 5)[0], resumed.batch(12, 5)[0]])
    assert torch.equal(halves, sampler.batch(7, 10)[0])
    with pytest.raises(ValueError, match="fewer than one window"):
        WindowSampler(torch.arange(10), length=10, seed=0)


def test_recorder_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, start=0)
    for step in (10, 20, 30):
        row = MetricsRow(step, 2.0, None, 1e-3, 8.0, 0.01, 100, 0.5)
        recorder.add(row, [RankRow(step, "w", 0, 8, 0.01)])
    RunRecorder(tmp_path, start=20)
    for name in ("metrics.csv", "ranks.csv"):
        assert [row["step"] for row in read_csv(tmp_path / name)] == ["10", "20"]
    RunRecorder(tmp_path, start=0)
    assert read_csv(tmp_path / "metrics.csv") == []


def test_state_bytes_of_any_optimizer() -> None:
    """Windows and codes take what they hold, not what they read as."""
    p = torch.nn.Parameter(torch.ones(4096))
    p.grad = torch.ones(4096)
    micro, adamw = MicroAdam([p]), torch.optim.AdamW([p])
    micro.step()
    adamw.step()
    step = 4
    assert state_bytes(micro) == micro.metrics().state_bytes + step < 4096 * 4
    assert state_bytes(adamw) == 2 * 4096 * 4 + step


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--deepspeed_config is required"),
        (["--deepspeed_config", "missing.json"], "no such file"),
        (["--deepspeed_config", __file__, "--model", "9b"], "invalid choice: '9b'"),
        (["--deepspeed_config", __file__, "--steps", "0"], "must be at least 1"),
        (["--deepspeed_config", __file__, "--load", "nowhere"], "no checkpoint there"),
        (["--deepspeed_config", __file__, "--load-universal", "nowhere"], "no such folder"),
        (["--deepspeed_config", __file__, "--load", "a", "--load-universal", "a"], "not allowed"),
        (["--deepspeed_config", __file__, "--save-on-sigterm"], "needs --save-dir"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train import parse_arguments

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert message in capsys.readouterr().err
