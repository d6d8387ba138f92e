# SPDX-License-Identifier: Apache-2.0
"""The arrows between modules, licences, sizes and docstrings, read off the source files."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType

import pytest

import adapprox_ds
from tests import ROOT

PACKAGE = ROOT / "adapprox_ds"
HEADER = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES = 700
OURS = "adapprox_ds"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in python_files(OURS)
}


def imports_of(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports by any reading, and whether it does so when it is imported itself.

    Imports inside functions and under ``TYPE_CHECKING`` count, and so does ``import_module``.

    Args:
        source: of the module.
        module: its absolute name.

    Raises:
        ValueError: a name that is imported is computed, so that nobody can read it.
    """
    package = (
        module if MODULES.get(module, ROOT).name == "__init__.py" else module.rpartition(".")[0]
    )
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    lazy = {node for f in ast.walk(tree) if isinstance(f, functions) for node in ast.walk(f)}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            # "from a import b": b may be a module.
            named = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else base for name in named]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            (name, *_) = node.args
            if not isinstance(name, ast.Constant):
                raise ValueError(f"{module} imports {ast.unparse(name)}: spell it out")
            found = [name.value]
        for name in found:
            yield name, node in lazy


#: By folder, what its modules may import beside each other and the standard library: folders of
#: the package, modules of its top, and other packages. "" is the package's own folder.
LIBRARIES = "_version core adapprox micro_adam matrix_views zero checkpoint"
ALLOWED = {
    "core": "torch",
    "core/kernels": "core torch triton",
    "adapprox": "core torch",
    "adapprox/kernels": "adapprox core torch triton",
    "micro_adam": "core torch",
    "micro_adam/kernels": "micro_adam core torch triton",
    "matrix_views": "core torch",
    "zero": "_version core adapprox micro_adam matrix_views torch deepspeed hjson",
    "checkpoint": "_version core adapprox micro_adam matrix_views zero torch deepspeed",
    "report": f"{LIBRARIES} torch numpy matplotlib rich transformers",
    "integrations": f"{LIBRARIES} transformers axolotl pydantic",
    "": f"{LIBRARIES} report",
}
#: What is imported inside functions alone, so that ``import adapprox_ds`` works without it.
ONLY_LAZILY = {"deepspeed", "hjson"}


def folder_of(module: str) -> str:
    """Where a module of the package lies: a key of ``ALLOWED``."""
    path = MODULES.get(module)
    parts = module.split(".")[1:]
    inside = parts if path is not None and path.name == "__init__.py" else parts[:-1]
    return "/".join(inside)


def forbidden(source: str, module: str) -> set[str]:
    """What a module must not import, of what it does."""
    folder = folder_of(module)
    allowed = {*ALLOWED[folder].split(), *filter(None, [folder.split("/")[0]])}
    found = set()
    for name, lazy in imports_of(source, module):
        first, *rest = name.split(".")
        unit = rest[0] if first == OURS and rest else first
        standard = first in sys.stdlib_module_names
        if not (standard or unit in allowed) or (unit in ONLY_LAZILY and not lazy):
            found.add(name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    """Nothing knows what lies above it or beside it, not even lazily or for its types."""
    assert not forbidden(MODULES[module].read_text(), module)


def test_every_folder_has_its_row() -> None:
    """And there is no row for a folder that is gone."""
    assert {folder_of(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize(
    ("folder", "source", "caught"),
    [
        ("core", "import math, torch", False),
        ("core", "from adapprox_ds.core import layout", False),
        ("core", "from adapprox_ds.core.kernels.backends import chosen", False),
        ("core", "from .layout import ShardLayout", False),
        ("core", "from ..zero import discover", True),
        ("core", "import deepspeed", True),
        ("core", "def f():\n    import deepspeed", True),
        ("core", "import numpy", True),
        ("core", "import triton", True),
        ("core", "def f():\n    from adapprox_ds.zero import unattached", True),
        ("core", "if TYPE_CHECKING:\n    from adapprox_ds.adapprox.fragment import Fragment", True),
        ("core", "import_module('adapprox_ds.adapprox.kernels')", True),
        ("core", "from adapprox_ds import attach", True),
        ("core/kernels", "import triton", False),
        ("adapprox", "from adapprox_ds.core.layout import ShardLayout", False),
        ("adapprox", "from adapprox_ds.micro_adam.window import WindowStore", True),
        ("micro_adam", "from adapprox_ds.adapprox import kernels", True),
        ("matrix_views", "from adapprox_ds.adapprox.state import make_ready", True),
        ("adapprox", "class A:\n    import deepspeed", True),
        ("zero", "def f():\n    import deepspeed.comm as dist", False),
        ("zero", "import deepspeed.comm as dist", True),
        ("zero", "try:\n    import deepspeed\nexcept ImportError:\n    pass", True),
        ("zero", "from adapprox_ds.checkpoint.files import CheckpointError", True),
        ("checkpoint", "from adapprox_ds.report import runs", True),
        ("report", "from adapprox_ds import Adapprox", True),
    ],
)
def test_the_arrows_checker(folder: str, source: str, caught: bool) -> None:
    """The checker sees what it should."""
    assert bool(forbidden(source, ".".join([OURS, *folder.split("/"), "x"]))) == caught


def test_computed_imports_are_refused() -> None:
    with pytest.raises(ValueError, match="spell it out"):
        forbidden("import_module(f'{__name__}.x')", f"{OURS}.core.x")


def circles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """What takes part in a circle of a graph: what can reach itself."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            new = set(graph.get(left.pop(), ())) - found
            found |= new
            left.extend(new)
        return found

    return [node for node in graph if node in reached(node)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """By any reading of imports, those that are lazy and those for types alone too."""
    graph = {
        module: {name for name, _ in imports_of(path.read_text(), module) if name in MODULES}
        for module, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 200
    assert circles(graph) == []


def test_the_circle_checker() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == ["b", "c"]


#: Imports each module alone in a process of its own, forked once torch is there: with the package's
#: own __init__ left out, and after it. Others' packages that are slow to import are made absent.
ALONE = """
import os, sys, types, torch, numpy
root, *modules = sys.argv[1:]
for absent in ("deepspeed", "transformers", "axolotl", "matplotlib"):
    sys.modules[absent] = None
for whole in (False, True):
    if whole:
        import adapprox_ds
    for module in modules:
        child = os.fork()
        if not child:
            if not whole:
                package = types.ModuleType("adapprox_ds")
                package.__path__ = [root]
                sys.modules["adapprox_ds"] = package
            try:
                __import__(module)
            except ImportError as error:
                if error.name is None or error.name.startswith("adapprox_ds"):
                    print(module, whole, repr(error), flush=True)
            except BaseException as error:
                print(module, whole, repr(error), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(module, whole, "died", flush=True)
"""


def test_each_module_can_be_imported_alone() -> None:
    """In a fresh process and before any other module, without DeepSpeed."""
    modules = [module for module in MODULES if module not in (OURS, f"{OURS}.__main__")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(PACKAGE), *modules],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


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
