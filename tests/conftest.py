# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Small matrices on few cores: one thread a process is fastest by far."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Products in bf16, where a CPU has them, would differ from the references by more than tests allow;
# test_native.py has tests of these.
os.environ.setdefault("CXXFLAGS", "-DADAPPROX_FP32_PRODUCTS")


def _commands_without_ninja() -> None:
    """Put the environment's commands on PATH one by one, without the folder that they lie in.

    It holds ninja too, and where DeepSpeed finds that it compiles, for minutes, an operator for
    collectives that no test needs.
    """
    binaries = Path(sys.executable).parent
    commands = Path(tempfile.mkdtemp(prefix="commands-"))
    atexit.register(shutil.rmtree, commands, ignore_errors=True)
    for name in ("python", "deepspeed", "torchrun"):
        if (binaries / name).exists():
            (commands / name).write_text(f'#!/bin/sh\nexec "{binaries / name}" "$@"\n')
            (commands / name).chmod(0o755)
    others = [p for p in os.environ.get("PATH", "").split(os.pathsep) if Path(p) != binaries]
    os.environ["PATH"] = os.pathsep.join([str(commands), *others])


_commands_without_ninja()

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.quick import is_quick  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="run only the files that need nothing but torch (tests/quick.py), without DeepSpeed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let every import of DeepSpeed fail in quick tests, in this process and in xdist's workers."""
    if config.getoption("quick"):
        sys.modules["deepspeed"] = None  # type: ignore[assignment]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the other files out before they are imported."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    left_out = config.getoption("quick") and is_test and not is_quick(collection_path)
    return True if left_out else None


#: Of files that take more than half a minute, longest first.
LONG = ["universal", "kernels", "pretrain_runs", "self_check", "killing", "elastic", "native"]
LONG += ["stages", "resume", "site", "scope", "moving_docs", "measured_memory", "cover"]
LONG += ["finetune_example", "matrix_views_docs", "oracle", "architecture", "paper_scripts"]


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    places = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that is imported, again and again."""
    gc.freeze()


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What failed in each case of a file that says ``WORLD = (number of ranks, module, cases)``."""
    from tests.world import run_world

    ranks, module, cases = request.module.WORLD
    return run_world(ranks, module, list(cases), tmp_path_factory.mktemp("world"))
