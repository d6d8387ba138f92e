# SPDX-License-Identifier: Apache-2.0
"""Which test files ``make quick`` runs: those of the algebra, for which torch is enough.

A test file is quick where it, and every module of ``tests`` that it imports, imports

* of the package only what is listed in :data:`ROOMS`, which never imports DeepSpeed; and
* nothing of :data:`SLOW`, which starts processes or runs the examples' scripts.

``pytest --quick`` (conftest.py) leaves the other files out and makes DeepSpeed unimportable, so a
file for which this rule were wrong would fail there.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = "adapprox_ds"
#: What of the package a quick test may import.
ROOMS = tuple(
    f"{PACKAGE}.{name}"
    for name in (
        "Adapprox",
        "MicroAdam",
        "core",
        "adapprox",
        "micro_adam",
        "matrix_views",
        "checkpoint.moments",
        "report.estimate",
        "report.model_shapes",
        "report.state_bytes",
    )
)
#: What no quick test may import.
SLOW = ("deepspeed", "subprocess", "multiprocessing", "importlib", "runpy")


def imported(source: str) -> set[str]:
    """Absolute names of all that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a name is one of the prefixes, or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def obstacles(source: str) -> set[str]:
    """The imports for which a module is not quick, those of other modules of ``tests`` aside."""
    return {
        name
        for name in imported(source)
        if within(name, SLOW) or (within(name, (PACKAGE,)) and not within(name, ROOMS))
    }


@cache
def is_quick(path: Path) -> bool:
    """Whether a test file, or a module of ``tests`` that one imports, is quick."""
    source = path.read_text()
    if obstacles(source):
        return False
    return all(is_quick(TESTS / name) for name in modules_of(source))


def modules_of(source: str) -> set[str]:
    """The files of ``tests``, below that folder, that a module imports."""
    names = [name.split(".")[1:] for name in imported(source) if within(name, ("tests",))]
    # "from tests.a import b" may name a module b of a folder a, or something in a module a.
    files = {"/".join(parts[:end]) + ".py" for parts in names for end in range(1, len(parts) + 1)}
    return {file for file in files if (TESTS / file).is_file()}


def quick_files() -> list[Path]:
    """The quick test files, in the order of their names."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if is_quick(path)]
