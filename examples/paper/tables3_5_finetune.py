# SPDX-License-Identifier: Apache-2.0
"""The paper's Tables 3 and 5 in kind: accuracy on sentences for and against a film, by optimizer.

    python examples/paper/tables3_5_finetune.py [--only NAME...] [--seeds 5] [--reuse] [--gpt]

* encoder (Table 5 in kind): all-MiniLM-L6-v2, a pretrained BERT of 22.7 M parameters, fine-tuned by
  the paper's optimizers, AdamW8bit, MicroAdam, which is made for fine-tuning, and Adapprox with a
  first moment of 4 bits and with weights in bf16;
* with --gpt, the paper's pattern: the small GPT on bytes, pretrained with the optimizer at the
  learning rate that losses.py found best for it, says which of two continuations of a sentence is
  likelier (Table 3), and is fine-tuned with the same optimizer. It is too small to beat chance.

Fine-tuning rates are swept alike for all on the first seed; seeds pair heads and data order. The
data are those of examples/finetune (fetched into runs/downloads). CAME needs pytorch_optimizer and
AdamW8bit torchao (pip install --no-deps). Writes results/tables3_5_finetune.json; with --only the
other rows stay, with --reuse runs of the encoder that are in it are not run again. Takes about two
minutes a run: --processes 2 where cores are idle.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_step import state_bytes
from losses import OPTIMIZERS, difference, ours
from peers import installed
from small_gpt import LENGTH, build_model, load_bytes, train
from torch import Tensor
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "finetune"))
from encoders import Encoder, load_encoder
from fetching import fetch_encoder, fetch_snippets
from snippets import Snippet, read_snippets, split_snippets

RESULTS = Path(__file__).parent / "results" / "tables3_5_finetune.json"
DOWNLOADS = Path(__file__).resolve().parent.parent.parent / "runs" / "downloads"
#: Fine-tuning rates that all optimizers try, by model.
RATES = {"GPT": (1e-3, 4e-3), "encoder": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}
STEPS, BATCH, PRETRAINING_STEPS = {"GPT": 300, "encoder": 240}, 16, 300
WARMUP = 0.1
#: Continuations of a sentence for and against; a byte model has no words of its own.
AGAINST, FOR = b" It is bad.", b" It is good."

Build = Callable[[list, float], torch.optim.Optimizer]


#: Who pretrains too, and who fine-tunes alone.
PRETRAINED = ("AdamW", "Adafactor", "CAME", "Adapprox, paper, k = 8", "Adapprox, default, k = 8")
FINE_TUNED = ("MicroAdam", "MicroAdam, window = 2, density = 0.05")
#: Whose model is in bf16: its weights are rounded at random, and there are no others.
IN_BF16 = ("Adapprox, bf16 weights, int8 first moment", "Adapprox, bf16 weights, int4 first moment")
BUILDS: dict[str, Build] = {
    **{name: OPTIMIZERS[name] for name in PRETRAINED[:3]},
    "AdamW8bit": OPTIMIZERS["AdamW8bit"],
    **{name: OPTIMIZERS[name] for name in (*PRETRAINED[3:], *FINE_TUNED)},
    "Adapprox, int4 first moment": ours(first_moment="int4"),
    IN_BF16[0]: ours(first_moment="int8"),
    IN_BF16[1]: ours(first_moment="int4"),
}


def pretrain(name: str, seed: int) -> GPT2LMHeadModel:
    """The small GPT, trained with the optimizer at its best rate."""
    rows = json.loads((RESULTS.parent / "losses.json").read_text())["optimizers"]
    rate = rows[name]["lr"]
    models: list[GPT2LMHeadModel] = []

    def make_model(seed: int) -> GPT2LMHeadModel:
        models.append(build_model(seed))
        return models[0]

    steps = PRETRAINING_STEPS
    train(load_bytes(), BUILDS[name], lr=rate, seed=seed, steps=steps, make_model=make_model)
    return models[0]


def as_bytes(texts: list[str]) -> list[list[int]]:
    """The end of each text, as much as the byte model takes, and an end of line."""
    return [[*text.encode()[1 - LENGTH :], 10] for text in texts]


@torch.no_grad()
def zero_shot(model: GPT2LMHeadModel, held_out: list[Snippet]) -> float:
    """Part of the sentences to which the model finds the right continuation likelier."""
    correct = 0
    for snippet in held_out:
        scores = []
        for continuation in (AGAINST, FOR):
            ids = torch.tensor([*(snippet.text.encode() + continuation)[-LENGTH:]])[None]
            logits = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            likelihoods = logits.gather(1, ids[0, 1:, None])
            scores.append(float(likelihoods[-len(continuation) :].mean()))
        correct += (scores[1] > scores[0]) == bool(snippet.label)
    return correct / len(held_out)


def batch_of(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Padded to the longest."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def batches(lengths: list[int], steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step's texts: shuffled, then of like length in groups of eight batches."""
    epochs = -(-steps * BATCH // len(lengths))
    order = torch.cat([torch.randperm(len(lengths), generator=generator) for _ in range(epochs)])
    sizes = torch.tensor(lengths)
    for group in order[: steps * BATCH].split(8 * BATCH):
        parts = group[sizes[group].argsort(stable=True)].split(BATCH)
        for i in torch.randperm(len(parts), generator=generator):
            yield parts[i]


def fine_tune(e: Encoder, build: Build, lr: float, kind: str, seed: int) -> tuple[float, int]:
    """Train a classifier; returns its accuracy on the held-out sentences and the state's bytes."""
    learned, held_out = split_snippets(read_snippets(fetch_snippets(DOWNLOADS)))
    ids = e.tokenize([snippet.text for snippet in learned])
    labels = torch.tensor([snippet.label for snippet in learned])
    optimizer, steps = build(list(e.model.named_parameters()), lr), STEPS[kind]
    rising = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rising, total_iters=rising),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rising),
        ],
        [rising],
    )
    generator = torch.Generator().manual_seed(seed)
    e.model.train()
    for chosen in batches(list(map(len, ids)), steps, generator):
        inputs = batch_of([ids[i] for i in chosen], e.pad_id)
        logits = e.model(**inputs).logits
        torch.nn.functional.cross_entropy(logits, labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(e.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    e.model.eval()
    rows, correct = e.tokenize([snippet.text for snippet in held_out]), 0
    truth = torch.tensor([snippet.label for snippet in held_out])
    with torch.no_grad():
        for a in range(0, len(rows), 64):
            found = e.model(**batch_of(rows[a : a + 64], e.pad_id)).logits.argmax(-1)
            correct += int((found == truth[a : a + 64]).sum())
    return correct / len(held_out), state_bytes(optimizer)


def gpt(task: tuple[str, int]) -> dict[str, Any]:
    """Zero-shot and fine-tuned accuracy of the model that an optimizer pretrained."""
    name, seed = task
    torch.set_num_threads(1)
    language = pretrain(name, seed)
    held_out = split_snippets(read_snippets(fetch_snippets(DOWNLOADS)))[1]
    found: dict[str, Any] = {"zero_shot": zero_shot(language, held_out), "fine_tuned": {}}
    for lr in RATES["GPT"]:
        torch.manual_seed(seed)
        language.config.num_labels, language.config.pad_token_id = 2, 0
        model = GPT2ForSequenceClassification(language.config)
        model.transformer.load_state_dict(language.transformer.state_dict())
        e = Encoder(model, as_bytes, 0)
        found["fine_tuned"][lr] = fine_tune(e, BUILDS[name], lr, "GPT", seed)[0]
    return found


#: Optimizer, learning rate, seed.
Task = tuple[str, float, int]


def encoder(task: Task) -> tuple[float, int]:
    """Accuracy of the fine-tuned encoder, and the state's bytes."""
    name, lr, seed = task
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    loaded = load_encoder(fetch_encoder(DOWNLOADS))
    if name in IN_BF16:
        loaded.model.to(torch.bfloat16)
    return fine_tune(loaded, BUILDS[name], lr, "encoder", seed)


def runs_of(name: str, row: dict[str, Any]) -> dict[Task, tuple[float, int]]:
    """The encoder's runs that a row of the result file holds."""
    size = row["state_bytes"]
    found = {(name, float(lr), 0): (x, size) for lr, x in row["encoder_sweep"].items()}
    return found | {(name, row["encoder_lr"], s): (x, size) for s, x in enumerate(row["encoder"])}


def row_of(
    name: str,
    seeds: int,
    pool: Executor,
    with_gpt: bool,
    found: dict[Task, tuple[float, int]] | None = None,
) -> dict[str, Any]:
    """All runs of one optimizer; of the encoder those that are not found yet."""
    found = dict(found or {})

    def add(tasks: list[Task]) -> list[float]:
        new = [task for task in tasks if task not in found]
        found.update(zip(new, pool.map(encoder, new), strict=True))
        return [found[task][0] for task in tasks]

    rates = RATES["encoder"]
    tried = dict(zip(rates, add([(name, lr, 0) for lr in rates]), strict=True))
    best = max(tried, key=lambda lr: tried[lr])
    row: dict[str, Any] = {
        "state_bytes": found[(name, best, 0)][1],
        "encoder_lr": best,
        "encoder_sweep": {str(lr): accuracy for lr, accuracy in tried.items()},
        "encoder": add([(name, best, seed) for seed in range(seeds)]),
    }
    if not with_gpt or name not in PRETRAINED:
        return row
    models = list(pool.map(gpt, [(name, seed) for seed in range(seeds)]))
    swept = models[0]["fine_tuned"]
    gpt_best = max(swept, key=swept.get)
    return row | {
        "gpt_lr": gpt_best,
        "gpt_sweep": {str(lr): accuracy for lr, accuracy in swept.items()},
        "gpt": [model["fine_tuned"][gpt_best] for model in models],
        "zero_shot": [model["zero_shot"] for model in models],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=BUILDS, default=list(BUILDS))
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--gpt", action="store_true", help="the small GPT too")
    options = parser.parse_args()
    fetch_encoder(DOWNLOADS)
    known = json.loads(RESULTS.read_text())["optimizers"] if RESULTS.exists() else {}
    with ProcessPoolExecutor(options.processes) as pool:
        for name in installed(options.only):
            held = runs_of(name, known[name]) if options.reuse and name in known else {}
            row = row_of(name, options.seeds, pool, options.gpt, held)
            # Without --gpt its runs stay.
            known[name] = row = known.get(name, {}) | row
            print(name, row, flush=True)
            rows = {n: known[n] for n in BUILDS if n in known}
            for found in rows.values():
                for key in {"encoder", "gpt"} & found.keys() if "AdamW" in rows else ():
                    # While seeds are added, the others have fewer.
                    theirs = rows["AdamW"][key][: len(found[key])]
                    found[f"{key}_minus_adamw"] = difference(found[key], theirs)
            RESULTS.write_text(json.dumps({"optimizers": rows}, indent=1) + "\n")
    for name, row in known.items():
        accuracies = {key: f"{mean(row[key]):.1%}" for key in ("encoder", "gpt") if key in row}
        print(name, accuracies)


if __name__ == "__main__":
    main()
