# SPDX-License-Identifier: Apache-2.0
"""Commands before a run, while it goes on and after it: ``configure``, ``watch``, ``report``."""

from __future__ import annotations

import argparse
import json
import sys

_RUN = "a folder of examples/pretrain, or one of DeepSpeed's csv_monitor (output_path/job_name)"


def add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``watch RUN``."""
    parser = commands.add_parser(
        "watch",
        help="show a run in the terminal while it goes on",
        description="Show losses, ranks by layer, errors, step time and optimizer state, from the "
        "CSV files that the run writes. Ctrl-C ends it, and so does the end of a run of "
        "examples/pretrain. Where the output is no terminal the newest numbers are printed once.",
    )
    parser.add_argument("folder", metavar="RUN", help=_RUN)

    def run(options: argparse.Namespace) -> None:
        from pathlib import Path

        from adapprox_ds.report.live import watch

        try:
            watch(Path(options.folder))
        except (ValueError, OSError, ModuleNotFoundError) as error:
            parser.error(str(error))

    parser.set_defaults(run=run)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``report RUN -o FILE``."""
    parser = commands.add_parser(
        "report",
        help="write a run's report as one HTML file",
        description="Write losses, ranks and errors by layer, step time and optimizer state of a "
        "run into one HTML file that needs no other and no network.",
    )
    parser.add_argument("folder", metavar="RUN", help=_RUN)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")

    def run(options: argparse.Namespace) -> None:
        from pathlib import Path

        from adapprox_ds.report.page import write

        try:
            write(Path(options.folder), Path(options.output))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(f"wrote {options.output}")

    parser.set_defaults(run=run)


def add_configure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``configure --model MODEL --gpus N --memory SIZE``."""
    parser = commands.add_parser(
        "configure",
        help="write a DeepSpeed config that fits",
        description="Choose ZeRO stage, offload and first moment for a model, a number of GPUs and "
        "their memory, and write a complete DeepSpeed config; a line for each choice goes to the "
        "standard error stream. What cannot fit is refused, and by how much.",
    )
    parser.add_argument(
        "--model", required=True, help="as for estimate: a name, or a transformers config.json"
    )
    parser.add_argument(
        "--gpus", "--world", type=int, required=True, help="number of GPUs, all hosts together"
    )
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of one GPU, such as 80GiB")
    parser.add_argument(
        "--activations",
        metavar="SIZE",
        help="of a GPU's memory, to leave to activations and buffers (default: a fifth)",
    )
    parser.add_argument(
        "--first-moment",
        choices=("fp32", "bf16", "int8", "int4"),
        help="the first moment to take (default: the largest that fits, down to int8)",
    )
    parser.add_argument(
        "--from",
        dest="base",
        metavar="CONFIG",
        help="a DeepSpeed config that stays as it is but for its optimizer",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; must not exist")

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.configure import configure, read_base
        from adapprox_ds.report.estimate import parse_size

        try:
            done = configure(
                options.model,
                gpus=options.gpus,
                memory=parse_size(options.memory),
                activations=options.activations and parse_size(options.activations),
                first_moment=options.first_moment,
                base=options.base and read_base(options.base),
            )
            text = json.dumps(done.config, indent=2) + "\n"
            if options.output is not None:
                with open(options.output, "x", encoding="utf-8") as file:
                    file.write(text)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print("\n".join(done.reasons), file=sys.stderr)
        print(f"wrote {options.output}" if options.output else text.rstrip())

    parser.set_defaults(run=run)
