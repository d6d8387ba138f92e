# SPDX-License-Identifier: Apache-2.0
"""One run on changing numbers of ranks, as on spot instances, beside an unbroken one.

python examples/elastic/elastic.py
"""

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapprox_ds.report.plot import draw
from adapprox_ds.report.runs import read_run

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "pretrain" / "train.py"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Reads and checks the command line; what it does not know goes to train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other arguments are those of examples/pretrain/train.py: --corpus, --model, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2, 1, 3],
        metavar="N",
        help="ranks of each leg; default: 2 1 3",
    )
    parser.add_argument("--leg", type=int, default=60, help="steps of a leg; default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=12, help="windows a step, all ranks; default: %(default)s"
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        default=ROOT / "ds_configs" / "ds_adapprox.json",
        help="its batch and the length of its schedule are replaced; default: %(default)s",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/elastic"), help="default: %(default)s"
    )
    args, others = parser.parse_known_args()
    if args.leg < 1:
        parser.error(f"--leg {args.leg}: must be at least 1")
    for ranks in args.ranks:
        if ranks < 1 or args.batch % ranks:
            parser.error(f"--ranks {ranks}: must be at least 1 and divide --batch {args.batch}")
    if not args.deepspeed_config.is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config}: no such file")
    return args, others


def config_of(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The same batch and schedule, whatever the number of ranks."""
    config: dict[str, Any] = json.loads(args.deepspeed_config.read_text())
    config.pop("gradient_accumulation_steps", None)
    config["train_batch_size"] = args.batch
    config["train_micro_batch_size_per_gpu"] = args.batch // ranks
    schedule = config["scheduler"]["params"]
    schedule["total_num_steps"] = args.leg * len(args.ranks)
    schedule["warmup_num_steps"] = max(schedule["total_num_steps"] // 10, 1)
    return config


def free_port() -> int:
    """A port that nobody listens on: other runs of this machine may have DeepSpeed's default."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train(args: argparse.Namespace, name: str, ranks: int, others: list[str]) -> Path:
    """Runs train.py on so many ranks; returns the run's folder."""
    path = args.folder / f"{name}.json"
    path.write_text(json.dumps(config_of(args, ranks), indent=2) + "\n")
    # By its module: the name "deepspeed" need not be on PATH.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), str(TRAIN), "--deepspeed_config", str(path)]
    command += ["--runs", str(args.folder), "--name", name, *others]
    print(f"\n== {name}", flush=True)
    subprocess.run(command, check=True)
    return args.folder / name


def convert(saves: Path, step: int) -> None:
    """Makes the newest checkpoint loadable on any number of ranks."""
    source = saves / f"global_step{step}"
    command = [sys.executable, "-m", "adapprox_ds", "convert", str(source), f"{source}_universal"]
    subprocess.run([*command, "--overwrite"], check=True)


def last_loss(run: Path) -> float:
    """Held-out loss at the end of a run, nats a token."""
    with (run / "metrics.csv").open(newline="") as file:
        return float([row["held_out_loss"] for row in csv.DictReader(file)][-1])


def picture(runs: list[Path], output: Path) -> None:
    """Draws all runs over steps; over time, legs on other numbers of ranks say nothing."""
    draw([replace(read_run(run), seconds=None) for run in runs]).savefig(output, dpi=100)


def main() -> None:
    """Trains, moves, and draws."""
    args, others = parse_arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # One evaluation on all held-out text a leg; rows often enough for a curve.
    others = ["--log-interval", str(max(args.leg // 20, 1)), *others]
    others = ["--eval-interval", str(args.leg), *others]

    total = args.leg * len(args.ranks)
    runs = [train(args, f"unbroken-{args.ranks[0]}-ranks", args.ranks[0], others)]
    for leg, ranks in enumerate(args.ranks, 1):
        step = leg * args.leg
        given = [*others, "--steps", str(step)]
        if leg > 1:
            given += ["--load-universal", str(args.folder / "saves")]
        if leg < len(args.ranks):
            given += ["--save-dir", str(args.folder / "saves")]
        runs.append(train(args, f"leg{leg}-{ranks}-ranks", ranks, given))
        if leg < len(args.ranks):
            convert(args.folder / "saves", step)
    picture(runs, args.folder / "elastic.png")
    print(
        f"\nheld-out loss after {total} steps: {last_loss(runs[-1]):.3f} nats/token on "
        f"{', '.join(map(str, args.ranks))} ranks in turn, {last_loss(runs[0]):.3f} on "
        f"{args.ranks[0]} throughout\nwritten: {args.folder / 'elastic.png'}"
    )


if __name__ == "__main__":
    main()
