# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m adapprox_ds COMMAND``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_RUN = "a folder of examples/pretrain, or one of DeepSpeed's csv_monitor (output_path/job_name)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m adapprox_ds", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_convert, _add_inspect, _add_estimate, _add_plot, _add_configs, _add_doctor):
        add(commands)
    for add in (_add_configure, _add_watch, _add_report):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 where a checkpoint cannot be used, the reason is on the standard error stream; 2 where
        no command is given, after its help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        build_parser().print_help(sys.stderr)
        return 2
    options = build_parser().parse_args(arguments)

    from adapprox_ds.checkpoint.files import CheckpointError

    try:
        options.run(options)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except options.refused as error:  # what bad arguments can raise in this command
        options.parser.error(str(error))
    return 0


def _add_convert(commands: _Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="make a universal checkpoint, factors kept as factors",
        description="Convert a checkpoint of DeepSpeed's ZeRO to the universal format, which "
        "loads at any stage and world size. The options of "
        "deepspeed.checkpoint.ds_to_universal are accepted.",
    )
    parser.add_argument("input", nargs="?", metavar="INPUT", help="checkpoint folder, or run root")
    parser.add_argument("output", nargs="?", metavar="OUTPUT", help="folder to make")
    parser.add_argument("--input_folder", help="the same as INPUT")
    parser.add_argument("--output_folder", help="the same as OUTPUT")
    parser.add_argument(
        "--second-moment",
        choices=("as-saved", "dense"),
        default="as-saved",
        help="dense: all that a stock AdamW run needs, the mean of gradients too",
    )
    parser.add_argument(
        "--num_merge_workers",
        type=int,
        default=2,
        help="parallel processes, each holding one parameter (default 2)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUTPUT")
    parser.add_argument(
        "--no_strict",
        dest="strict",
        action="store_false",
        help="do not compare the fp32 weights with the model's",
    )
    _add_trust(parser)
    for flag, kind, why in (
        ("--num_extract_workers", int, "there is no extraction pass"),
        ("--keep_temp_folder", None, "there are no temporary fragments"),
        ("--inject_missing_state", None, "plain models are always accepted"),
    ):
        text = f"accepted for ds_to_universal's sake; no effect: {why}"
        if kind is None:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=kind, help=text)

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.checkpoint.universal import convert

        source = options.input_folder or options.input
        # "--input_folder IN OUT": the one positional argument is the output then.
        output = options.output_folder or options.output
        output = output or (options.input if options.input_folder else None)
        if source is None or output is None:
            raise ValueError("INPUT and OUTPUT are required")
        done = convert(
            source,
            output,
            second_moment=options.second_moment,
            workers=options.num_merge_workers,
            strict=options.strict,
            overwrite=options.overwrite,
            trusted=options.trust,
        )
        print(f"wrote {done}")

    parser.set_defaults(run=run, parser=parser, refused=(ValueError,))


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load objects of any class from the checkpoint, which can run any code: for files "
        "whose writer you trust, with classes of your own in their client_state",
    )


def _add_inspect(commands: _Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds",
        description="Print steps, shapes, ranks, bytes and errors; exit code 1 and a message for "
        "an incomplete or foreign checkpoint.",
    )
    parser.add_argument("checkpoint", help="a checkpoint folder or a run root")
    _add_trust(parser)

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.checkpoint.inspect import inspect

        print(inspect(options.checkpoint, trusted=options.trust).table())

    parser.set_defaults(run=run, parser=parser, refused=())


def _add_estimate(commands: _Commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="say what a model's training will hold a rank",
        usage="python -m adapprox_ds estimate --model MODEL --stage N --world N [options]\n"
        "       python -m adapprox_ds estimate --fit MEMORY --world N",
        description="Print bytes a rank of weights, gradients and optimizer state, beside other "
        "optimizers', and from which world size on factoring saves nothing. Needs no weights.",
    )
    parser.add_argument(
        "--fit",
        metavar="MEMORY",
        help="instead of one model, the largest known one that fits GPUs of so much, as 80GiB",
    )
    parser.add_argument(
        "--model",
        help="gpt2-124m, gpt2-345m, bert-base, llama-3-8b, llama-3-70b, a folder with a "
        "transformers config.json, or such a file",
    )
    parser.add_argument("--stage", type=int, help="ZeRO stage, 0 to 3")
    parser.add_argument("--world", "--gpus", type=int, required=True, help="number of ranks")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--rank-max",
        dest="ranks",
        type=int,
        nargs=1,
        metavar="K",
        help="rank of every matrix (default: Adapprox's rank_max)",
    )
    ranks.add_argument("--ranks", type=int, nargs="+", metavar="K", help="a count for each")
    parser.add_argument("--dtype", default="bf16", help="bf16 (default), fp16 or fp32")
    parser.add_argument(
        "--masters",
        default="fp32",
        help="the optimizer's own weights: fp32 (default), bf16, or compensated, bf16 with one "
        "byte of what rounding took",
    )
    parser.add_argument(
        "--first-moment",
        default="fp32",
        help="fp32 (default), bf16, int8, int4, or none for beta_1 = 0",
    )
    parser.add_argument("--factor-dtype", default="fp32", help="fp32 (default) or bf16")
    parser.add_argument(
        "--scope", default="partition", help="partition (default), or matrix: one factorisation"
    )
    parser.add_argument(
        "--right-factor", help="with --scope matrix: sharded (default) or replicated"
    )
    parser.add_argument(
        "--two-groups",
        action="store_true",
        help="vectors in a parameter group of their own, as where matrices alone decay",
    )

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.estimate import fit, parse_size, report

        if options.fit is None and (options.model is None or options.stage is None):
            raise ValueError("--model and --stage are required, or --fit")
        if options.fit is not None:
            print(fit(parse_size(options.fit), world=options.world))
            return
        names = "stage world ranks dtype masters first_moment factor_dtype scope right_factor"
        given = {name: getattr(options, name) for name in names.split()}
        print(report(options.model, two_groups=options.two_groups, **given))

    parser.set_defaults(run=run, parser=parser, refused=(ValueError,))


def _add_plot(commands: _Commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw the losses and ranks of runs",
        description="Draw the losses of several runs over steps and over time, and the ranks of "
        "each by layer, in one picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .svg, .pdf"
    )

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.plot import plot

        plot(options.runs, options.output)
        print(f"wrote {options.output}")

    parser.set_defaults(run=run, parser=parser, refused=(ValueError, OSError, ModuleNotFoundError))


def _add_configs(commands: _Commands) -> None:
    parser = commands.add_parser(
        "configs",
        help="list, print or write a complete DeepSpeed config",
        description="Without NAME, list the DeepSpeed configs that the package brings; with it, "
        "print that one, or write it to a file.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as ds_adapprox_zero3")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; must not exist")

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report import configs

        if options.output and options.name is None:
            raise ValueError("--output: NAME is required")
        if options.name is None:
            print("\n".join(configs.names()))
            return
        text = configs.read(options.name)
        if options.output is None:
            print(text, end="")
            return
        with open(options.output, "x", encoding="utf-8") as file:
            file.write(text)
        print(f"wrote {options.output}")

    parser.set_defaults(run=run, parser=parser, refused=(ValueError, OSError))


def _add_doctor(commands: _Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what would run here, how fast, and what a config would do",
        description="Print versions, kernels and why one is not used, the time of a step beside "
        "fused AdamW's and, of a DeepSpeed config, which optimizer runs and what is refused. Exit "
        "code 1 where something that was asked for would fail; its line begins with '!'.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a DeepSpeed JSON")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="to spend on timing; 0 for none (default 5)"
    )

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.doctor import examine, table

        findings = examine(options.config, options.seconds)
        print(table(findings))
        if any(finding.fails for finding in findings):
            sys.exit(1)

    parser.set_defaults(run=run, parser=parser, refused=())


def _add_watch(commands: _Commands) -> None:
    parser = commands.add_parser(
        "watch",
        help="show a run in the terminal while it goes on",
        description="Show losses, ranks by layer, errors, step time and optimizer state, from the "
        "CSV files that the run writes. Ctrl-C ends it, and so does the end of a run of "
        "examples/pretrain. Where the output is no terminal the newest numbers are printed once.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help=_RUN)

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.live import watch

        watch(options.folder)

    parser.set_defaults(run=run, parser=parser, refused=(ValueError, OSError, ModuleNotFoundError))


def _add_report(commands: _Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's report as one HTML file",
        description="Write losses, ranks and errors by layer, step time and optimizer state of a "
        "run into one HTML file that needs no other and no network.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="file to write"
    )

    def run(options: argparse.Namespace) -> None:
        from adapprox_ds.report.page import write

        write(options.folder, options.output)
        print(f"wrote {options.output}")

    parser.set_defaults(run=run, parser=parser, refused=(ValueError, OSError))


def _add_configure(commands: _Commands) -> None:
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
        print("\n".join(done.reasons), file=sys.stderr)
        print(f"wrote {options.output}" if options.output else text.rstrip())

    parser.set_defaults(run=run, parser=parser, refused=(ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
