# SPDX-License-Identifier: Apache-2.0
"""The arrows between modules, licences, sizes and docstrings, read off the source files."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import adapprox_ds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "adapprox_ds"
HEADER = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 700
OURS = "adapprox_ds"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(tree: ast.Module, package: str, *, everywhere: bool = False) -> set[str]:
    """Absolute names that a module imports when it is imported itself.

    Args:
        tree: the module.
        package: the package that it lies in, for relative imports.
        everywhere: those inside functions too.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            # "from a import b": b may be a module.
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not everywhere:
            return
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                visit(branch)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


#: What modules may import beside the standard library and torch, by place in the package.
#: Modules elsewhere are free.
ALLOWED: dict[str, tuple[str, ...]] = {
    "zero/layout.py": (f"{OURS}.lowrank",),
    "lowrank/": (f"{OURS}.lowrank",),
    "sparse/": (
        *(f"{OURS}.lowrank.{x}" for x in ("compact", "rounding", "saved")),
        f"{OURS}.sparse",
    ),
    "kernels/": ("triton", *(f"{OURS}.{x}" for x in ("lowrank", "sparse", "kernels"))),
    "optim/": tuple(
        f"{OURS}.{part}"
        for part in ("lowrank", "sparse", "kernels", "zero.layout", "zero.peers", "optim")
    ),
    "zero/peers.py": (f"{OURS}.zero.layout",),
}


def forbidden(names: set[str], place: str) -> set[str]:
    """What a module at ``place`` must not import, of what it does."""
    allowed = next(parts for prefix, parts in ALLOWED.items() if place.startswith(prefix))
    return {
        name for name in names if not within(name, (*sys.stdlib_module_names, "torch", *allowed))
    }


PLACES = {
    place: ast.parse(path.read_text())
    for path in python_files(OURS)
    if (place := path.relative_to(PACKAGE).as_posix()).startswith(tuple(ALLOWED))
}


@pytest.mark.parametrize("place", PLACES)
def test_arrows_point_down(place: str) -> None:
    """Nothing below knows what lies above it; ``lowrank`` and ``layout`` not even lazily."""
    package = ".".join([OURS, *place.split("/")[:-1]])
    pure = place.startswith(("lowrank/", "sparse/")) or place == "zero/layout.py"
    names = imports_of(PLACES[place], package, everywhere=pure)
    assert not forbidden(names, place)


def test_the_parts_exist() -> None:
    """Else the arrows above hold for nothing."""
    assert {"lowrank", "sparse", "optim", "zero"} <= {place.split("/")[0] for place in PLACES}


@pytest.mark.parametrize(
    ("place", "source", "caught"),
    [
        ("lowrank/x.py", "import deepspeed", True),
        ("lowrank/x.py", "import math, torch", False),
        ("lowrank/x.py", "from adapprox_ds.lowrank.rank import RankPolicy", False),
        ("lowrank/x.py", "from adapprox_ds.zero.layout import ShardLayout", True),
        ("lowrank/x.py", "from ..zero import layout", True),
        ("lowrank/x.py", "from .rank import RankPolicy", False),
        ("lowrank/x.py", "import numpy", True),
        ("zero/layout.py", "from adapprox_ds.zero import discover", True),
        ("optim/x.py", "try:\n    import deepspeed\nexcept ImportError:\n    pass", True),
        ("optim/x.py", "from deepspeed.utils import groups", True),
        ("optim/x.py", "class A:\n    import deepspeed", True),
        ("optim/x.py", "from adapprox_ds.zero import discover", True),
        ("optim/x.py", "from adapprox_ds.zero import layout", False),
        ("optim/x.py", "from adapprox_ds.zero.layout import ShardLayout", False),
        ("optim/x.py", "from adapprox_ds import attach", True),
        ("optim/x.py", "def f():\n    import deepspeed", False),
        ("optim/x.py", "if TYPE_CHECKING:\n    from adapprox_ds.zero.discover import S", False),
        ("optim/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import deepspeed", True),
        ("optim/x.py", "import deepspeed.comm as dist", True),
    ],
)
def test_the_arrows_checker(place: str, source: str, caught: bool) -> None:
    """The checker sees what it should."""
    package = f"{OURS}.{place.split('/')[0]}"
    assert bool(forbidden(imports_of(ast.parse(source), package), place)) == caught


def test_import_and_plain_step_do_without_deepspeed() -> None:
    """In a fresh process neither imports DeepSpeed; nor touches the global random state."""
    code = (
        "import sys, torch; state = torch.get_rng_state(); import adapprox_ds\n"
        "p = torch.nn.Parameter(torch.ones(8, 8)); o = adapprox_ds.Adapprox([p])\n"
        "p.grad = torch.ones(8, 8); o.step(); o.metrics(); o.state_dict()\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} & "
        "{'deepspeed', 'transformers', 'matplotlib'}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


FILES = [*python_files(OURS, "tests", "examples"), *sorted(ROOT.glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_licensed_and_short(path: Path) -> None:
    """The header is the first line (or the second, after a shebang); no file is endless."""
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert first == HEADER
    assert len(lines) < MAX_LINES


def public_members() -> Iterator[tuple[str, object]]:
    """Public names of the package, and the public methods and properties written here."""
    for name in adapprox_ds.__all__:
        member = getattr(adapprox_ds, name)
        if isinstance(member, str):
            continue
        yield name, member
        if inspect.isclass(member):
            for key, value in vars(member).items():
                if isinstance(value, (FunctionType, property)) and not key.startswith("_"):
                    yield f"{name}.{key}", value


MEMBERS = dict(public_members())


@pytest.mark.parametrize("name", MEMBERS)
def test_public_names_have_docstrings(name: str) -> None:
    """Their own, beginning with a sentence."""
    documentation = getattr(MEMBERS[name], "__doc__", None) or ""
    assert documentation.strip().splitlines()[0].endswith((".", "?"))


def test_public_names_are_stated() -> None:
    """What is importable from the package's top is what ``__all__`` says, submodules aside."""
    public = {
        name
        for name, value in vars(adapprox_ds).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(adapprox_ds.__all__) - {"__version__"}
    assert adapprox_ds.__version__.count(".") >= 1


#: Functions of torch that make a tensor of nothing but numbers; of Python numbers' dtype, too.
MAKERS = "tensor as_tensor scalar_tensor zeros ones empty full eye linspace logspace rand randn"
INDICES = "arange randint randperm tril_indices triu_indices"


@pytest.mark.parametrize("path", python_files("adapprox_ds"), ids=str)
def test_tensors_are_made_with_dtype_and_device(path: Path) -> None:
    """A program's default dtype or device is never the optimizers'."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        if module != "torch" or name not in f"{MAKERS} {INDICES}".split():
            continue
        given = {keyword.arg for keyword in node.keywords}
        needed = {"device"} | ({"dtype"} if name in MAKERS.split() else set())
        assert needed <= given, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
