# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning example: its data, its encoders, its config, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from configuration import batch_size, finetuning_config
from corpus import Document, train_tokenizer
from encoders import load_encoder
from fetching import FetchError, fetch_snippets
from modeling import SIZES, build_model
from snippets import Snippet, read_snippets, split_snippets
from tests.project.cases_finetune import CASES, ROOT, arguments, write_bert, write_sentences
from tests.world import free_port, run_world

CONFIG = json.loads((ROOT / "ds_configs" / "ds_adapprox.json").read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "shared"
    folder.mkdir()
    write_sentences(folder / "sentences.tsv")
    write_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def outcomes(shared: Path) -> dict[str, str]:
    return run_world(2, "tests.project.cases_finetune", list(CASES), shared.parent)


@pytest.mark.parametrize("case", CASES)
def test_learns_on_two_ranks(outcomes: dict[str, str], case: str) -> None:
    assert not outcomes[case], outcomes[case]


def test_ours_keep_less(outcomes: dict[str, str], shared: Path) -> None:
    kept = {
        name: json.loads((shared / "runs" / name / "results.json").read_text())[
            "optimizer_state_bytes"
        ]
        for name in CASES
    }
    assert kept["microadam"] < kept["adapprox"] < kept["adamw"]


def test_data_out_of_reach_is_said_and_returned(shared: Path) -> None:
    given = arguments(shared, "offline")
    del given[given.index("--data") : given.index("--data") + 2]
    given += ["--deepspeed_config", str(ROOT / "ds_configs" / "ds_adapprox.json")]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shared), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "finetune" / "train.py"), *given],
        env=os.environ | one | offline | {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == os.EX_UNAVAILABLE, done.stdout + done.stderr
    assert "pip could not download vaderSentiment==3.3.2" in done.stderr
    assert "give --data FILE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shared / "runs" / "offline").exists()


def test_real_sentences(tmp_path: Path) -> None:
    try:
        path = fetch_snippets(tmp_path / "cache")
    except FetchError as error:
        pytest.skip(str(error))
    snippets = read_snippets(path)
    assert Counter(snippet.label for snippet in snippets) == {1: 4996, 0: 5076}
    train, held_out = split_snippets(snippets)
    assert len(held_out) / len(snippets) == pytest.approx(0.1, abs=0.01)
    assert not {snippet.text for snippet in train} & {snippet.text for snippet in held_out}
    stamp = path.stat().st_mtime_ns
    assert fetch_snippets(tmp_path / "cache").stat().st_mtime_ns == stamp


def test_split_depends_on_the_text_alone() -> None:
    snippets = [Snippet(f"sentence {index}", index % 2) for index in range(200)]
    _, held_out = split_snippets(snippets)
    assert 10 < len(held_out) < 30
    _, of_half = split_snippets(snippets[100:][::-1])
    assert set(of_half) == set(held_out) & set(snippets[100:])
    with pytest.raises(ValueError, match="1 sentences are too few"):
        split_snippets(snippets[:1])


def test_lines_are_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.tsv"
    path.write_text("1\t0.5\tgood\n2\t-0.49\tso so\n\n3\t-3\tbad\n")
    assert read_snippets(path) == [Snippet("good", 1), Snippet("bad", 0)]
    path.write_text("1\t2.0\tgood\ngood\t2.0\n")
    with pytest.raises(ValueError, match="line 2: expected 'id TAB rating TAB text'"):
        read_snippets(path)


def test_config_keeps_what_both_optimizers_know() -> None:
    same = finetuning_config(CONFIG, None, lr=5e-5, steps=700)
    assert same["optimizer"]["params"] == {**CONFIG["optimizer"]["params"], "lr": 5e-5}
    assert finetuning_config(CONFIG, "adapprox", lr=5e-5, steps=700) == same
    assert same["scheduler"]["params"]["total_num_steps"] == 700
    assert same["scheduler"]["params"]["warmup_num_steps"] == 7
    other = finetuning_config(CONFIG, "adamw", lr=5e-5, steps=700)
    shared = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "lr": 5e-5}
    assert other["optimizer"] == {"type": "AdamW", "params": {**shared, "torch_adam": True}}
    assert finetuning_config(other, "adapprox", 5e-5, 700)["optimizer"] == {
        "type": "Adapprox",
        "params": shared,
    }
    assert other["zero_optimization"] == CONFIG["zero_optimization"]
    with pytest.raises(ValueError, match='names no "optimizer"'):
        finetuning_config({}, None, lr=5e-5, steps=1)


def test_batch_is_deepspeeds() -> None:
    assert batch_size(CONFIG, world_size=3) == 24
    assert batch_size({**CONFIG, "gradient_accumulation_steps": 4}, world_size=3) == 96
    assert batch_size({"train_batch_size": 12}, world_size=3) == 12
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu"):
        batch_size({}, world_size=3)


@torch.no_grad()
def test_pretrained_gpt2_reads_the_last_token(tmp_path: Path) -> None:
    """Of a run folder's model: a sentence scores the same alone and in a padded batch."""
    torch.manual_seed(0)
    text = "the war and the peace and the trade of the nation " * 50
    pretrained = build_model(SIZES["tiny"])
    pretrained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer([Document("a", text)], 4096))
    encoder = load_encoder(tmp_path)
    weights = pretrained.transformer.state_dict()
    assert all(
        torch.equal(value, weights[key])
        for key, value in encoder.model.transformer.state_dict().items()
    )
    short, long = encoder.tokenize(["the war", "the peace and the trade " * 60])
    assert len(long) == 128
    assert short[-1] == long[-1] == 1  # the end of a document
    assert encoder.pad_id not in [*short, *long]
    padded = torch.tensor([[*short, *[encoder.pad_id] * (128 - len(short))], long])
    together = encoder.model(input_ids=padded, attention_mask=padded != encoder.pad_id).logits
    alone = [encoder.model(input_ids=torch.tensor([ids])).logits for ids in (short, long)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
