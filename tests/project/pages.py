# SPDX-License-Identifier: Apache-2.0
"""What the tests of pages share: the pages' code, and running it in a process of its own."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import ROOT
from tests.world import fork, free_port


def blocks(page: str, language: str) -> list[str]:
    """The code of a page of the repository in a language, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def printed(command: Sequence[str], folder: Path = ROOT, **environment: str) -> str:
    """What a command prints that can import the repository; it has to succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def one_process() -> dict[str, str]:
    """The environment of a process that is alone in its process group."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return alone | {"MASTER_PORT": str(free_port())}


def forked(
    arguments: Sequence[str], folder: Path = ROOT, ranks: int = 1, **environment: str
) -> str:
    """What ``python ARGUMENTS`` prints on each of so many ranks, all of which have to succeed.

    The ranks are forked off a process that has imported DeepSpeed: to import it takes most of the
    time of a small run. ``{rank}`` in an argument stands for the rank.
    """
    shared = os.environ | one_process() | {"WORLD_SIZE": str(ranks)} | environment
    with TemporaryDirectory() as scratch:
        logs = [Path(scratch) / str(rank) for rank in range(ranks)]
        works = [
            partial(
                _interpret,
                [argument.replace("{rank}", str(rank)) for argument in arguments],
                folder,
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                log,
            )
            for rank, log in enumerate(logs)
        ]
        codes = fork(works)
        said = [log.with_suffix(".err").read_text() for log in logs]
        assert codes == [0] * ranks, f"{arguments}: {codes}\n" + "\n".join(x[-3000:] for x in said)
        return "".join(log.with_suffix(".out").read_text() for log in logs)


def _interpret(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
    """Go on as ``python ARGUMENTS`` in a folder; what is printed goes to files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def shell(commands: str, folder: Path) -> str:
    """What a page's commands print, one a line: ``export``, ``python`` and ``torchrun``."""
    from torch.distributed.run import parse_args

    found, environment = "", dict[str, str]()
    for line in commands.splitlines():
        name, *rest = shlex.split(line)
        if name == "export":
            environment |= dict(word.split("=", 1) for word in rest)
        elif name == "torchrun":
            given = parse_args(rest)
            program = [given.training_script, *given.training_script_args]
            found += forked(program, folder, int(given.nproc_per_node), **environment)
        else:
            assert name == "python", line
            found += forked(rest, folder, **environment)
    return found
