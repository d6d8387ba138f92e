# SPDX-License-Identifier: Apache-2.0
"""The backends of the two passes against one dense computation, and which of them is taken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds import kernels
from adapprox_ds.kernels import tiles
from tests.cases_kernels import CHECKS, Case, Data, both_passes, check

ROOT = Path(__file__).resolve().parent.parent


# --- The torch backend ---------------------------------------------------------------------------

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CASES = st.builds(
    Case,
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 9),
    w=st.integers(1, 9),
    b=st.integers(1, 3),
    floor=st.booleans(),
    moment=st.booleans(),
    of_gradients=st.booleans(),
    nesterov=st.booleans(),
    clips=st.booleans(),
    largest=st.sampled_from([0.5, 1.5, math.inf]),
    ascend=st.booleans(),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    dtype=FLOATS,
    moment_dtype=st.none() | FLOATS,
    factors=st.sampled_from([torch.float32, torch.float64]),
    separate=st.booleans(),
    offset=st.integers(0, 9),
    gap=st.integers(0, 9),
    transposed=st.booleans(),
)


@given(c=CASES, tile=st.sampled_from([1, 64, 1 << 16]))
@settings(max_examples=150, deadline=None)
def test_tiles_compute_the_formulas(c: Case, tile: int) -> None:
    with mock.patch.object(tiles, "_CPU_TILE", tile):
        check(tiles, c)


# --- Which backend -------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FULL = torch.float32


def backend(device: torch.device, dtype: torch.dtype = FULL, rank: int = 8, width: int = 13) -> str:
    """The backend of a stack; it looks at no numbers, and no such device is needed."""
    shapes = ((2, 20, rank), (2, 30, width))
    factors, wide = (SimpleNamespace(device=device, dtype=dtype, shape=shape) for shape in shapes)
    element = SimpleNamespace(device=device, dtype=FULL, shape=(20, 30))
    return kernels.backend([element], None, factors, wide)  # type: ignore[arg-type, list-item]


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; nothing is remembered of devices before or after."""
    kernels._missing.cache_clear()
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield lambda value: monkeypatch.setenv(kernels.VARIABLE, value)
    kernels._missing.cache_clear()


def test_torch_where_it_is_asked_for(variable: Callable[[str], None]) -> None:
    variable("torch")
    assert backend(CPU) == backend(CUDA) == "torch"


@pytest.mark.parametrize(
    ("dtype", "rank", "width", "fused"),
    [
        (FULL, 1, 6, True),
        (FULL, kernels.FUSED_LIMIT, kernels.FUSED_LIMIT, True),
        (FULL, kernels.FUSED_LIMIT + 1, 5, False),
        (FULL, 5, kernels.FUSED_LIMIT + 1, False),
        (torch.float64, 8, 13, False),
        (torch.bfloat16, 8, 13, False),
    ],
)
def test_triton_takes_what_it_can_fuse(
    dtype: torch.dtype, rank: int, width: int, fused: bool, variable: Callable[[str], None]
) -> None:
    """And only where it is asked for."""
    with mock.patch.object(kernels, "_missing", return_value=None):
        assert backend(CUDA, dtype, rank, width) == "torch"
        variable("triton")
        assert backend(CUDA, dtype, rank, width) == ("triton" if fused else "torch")
        variable("torch")
        assert backend(CUDA, dtype, rank, width) == "torch"


@pytest.mark.parametrize("value", ["", "Triton", "cuda"])
def test_a_bad_variable_is_refused(value: str, variable: Callable[[str], None]) -> None:
    variable(value)
    with pytest.raises(ValueError, match=f"ADAPPROX_KERNELS='{value}'.*triton, torch"):
        backend(CPU)


def test_triton_where_it_cannot_run_is_refused(variable: Callable[[str], None]) -> None:
    variable("triton")
    d = Data(Case(4, 5, 1, 2))
    with pytest.raises(RuntimeError, match="ADAPPROX_KERNELS=triton, but .* are on cpu"):
        both_passes(kernels, d)


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "compute capability 8.0"), ((9, 0), "cannot be imported")]
)
def test_devices_without_triton(
    capability: tuple[int, int], reason: str, variable: Callable[[str], None]
) -> None:
    """They take torch, unless Triton is asked for."""
    hidden = dict.fromkeys(("triton", "adapprox_ds.kernels.triton_passes"))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.dict(sys.modules, hidden),
    ):
        assert backend(CUDA) == "torch"
        variable("triton")
        with pytest.raises(RuntimeError, match=reason):
            backend(CUDA)


def test_import_and_a_step_on_the_cpu_do_without_triton() -> None:
    code = (
        "import sys, torch, adapprox_ds; before = 'triton' in sys.modules\n"
        "p = torch.nn.Parameter(torch.ones(8, 8)); o = adapprox_ds.Adapprox([p])\n"
        "p.grad = torch.ones(8, 8); o.step()\n"
        # torch itself imports Triton once an optimizer is made.
        "sys.exit(before or 'adapprox_ds.kernels.triton_passes' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != kernels.VARIABLE}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


# --- The Triton backend without a GPU: interpreted, and compiled ---------------------------------


@pytest.fixture(scope="module")
def interpreter() -> dict[str, str]:
    """Name of a check -> what went wrong, from a process that interprets Triton."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop(kernels.VARIABLE, None)
    command = [sys.executable, "-m", "tests.cases_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_triton_interpreted(name: str, interpreter: dict[str, str]) -> None:
    assert not interpreter[name], interpreter[name]


#: What a launch passes, by name: m, n, k and w; what is absent, and the constants of the step.
COMPILED: dict[str, tuple[tuple[int, int, int, int], set[str], dict[str, bool]]] = {
    "usual": ((768, 3072, 8, 13), set(), {"OF_GRADIENTS": True, "ALIGNED": True}),
    "all one": (
        (1, 1, 1, 1),
        {"floor_ptr", "m_ptr", "squares_ptr", "clip_ptr"},
        {"OF_GRADIENTS": False, "ALIGNED": False},
    ),
    "largest": ((70, 70, 128, 128), set(), {"OF_GRADIENTS": False, "ALIGNED": False}),
}
SCALARS = {"root_beta2", "rest2", "correction", "eps", "beta1", "gain", "largest", "rate", "decay"}


@pytest.mark.parametrize("size", COMPILED)
@pytest.mark.parametrize("name", ["first", "second"])
def test_triton_compiles_for_hopper(
    name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, without a GPU: the interpreter lets pass what the compiler refuses.

    As at a launch, what is 1 is a compile-time constant, and so is an absent tensor; of what is
    divisible by 16 the compiler knows.
    """
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    from adapprox_ds.kernels import triton_kernels, triton_passes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (m, n, k, w), absent, flags = COMPILED[size]
    cut = triton_passes._Cut.of(4, m, n, k, w, rows_owned=name == "first")
    kernel = getattr(triton_kernels, f"{name}_kernel")
    constants: dict[str, Any] = cut.constants | flags | dict.fromkeys(absent)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    numbers = {"m": m, "n": n, "k": k, "w": w, "q_step": m * k, "u_step": n * k, "by_col_step": n}
    numbers |= {"q_row": k, "u_row": k, "sketch_row": w, "basis_row": w, "floor_row": max(m, n)}
    numbers |= dict.fromkeys(("q_col", "u_col", "sketch_col", "basis_col", "floor_col"), 1)
    signature, known = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if numbers.get(argument) == 1:
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "places_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16" if argument in ("g_ptr", "m_ptr") else "*fp32"
        else:
            signature[argument] = "fp32" if argument in SCALARS else "i32"
        pointer = argument.endswith("_ptr") and argument not in absent
        if (pointer and flags["ALIGNED"]) or numbers.get(argument, 1) % 16 == 0:
            known[(index,)] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    built = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in built.asm["ptx"] and built.asm["cubin"], "no tensor cores"
    assert "atom" not in built.asm["ptx"], "sums that depend on the order of programs"
    # What small GPUs have for one program.
    assert built.metadata.shared <= 99 * 1024


# --- The Triton backend on a GPU -----------------------------------------------------------------

ON_CUDA = Case(1000, 3072, 8, 13, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "c",
    [
        ON_CUDA,
        replace(ON_CUDA, m=4096, n=1024, k=1, w=6, offset=0, gap=0),
        replace(ON_CUDA, m=5025, n=768, k=16, w=21, floor=False, transposed=True),
        replace(ON_CUDA, m=2048, n=2048, b=3, k=64, w=69, dtype=torch.bfloat16),
        replace(ON_CUDA, m=768, n=768, b=40, offset=0, gap=32, of_gradients=False),
        replace(ON_CUDA, m=2048, n=8192, b=5, k=4, w=9, separate=True, clips=False),
        replace(ON_CUDA, b=1, k=123, w=128, moment_dtype=torch.bfloat16),
        replace(ON_CUDA, m=1, n=5000, k=1, w=1, eps=0.0, moment=False),
        replace(ON_CUDA, m=5000, n=1, k=1, w=1, dtype=torch.float16, ascend=True),
    ],
    ids=str,
)
def test_triton_on_cuda(c: Case, variable: Callable[[str], None]) -> None:
    """Both backends agree with the formulas, so with each other; bits repeat; nothing waits."""
    variable("triton")
    assert backend(CUDA, c.factors, c.k, c.w) == "triton"
    check(tiles, c)
    first = check(kernels, c)
    d = Data(c)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reduced = both_passes(kernels, d)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    updated = {name: torch.cat(flats) for name, flats in d.flat.items()}
    for name, value in (reduced | updated).items():
        assert torch.equal(value.nan_to_num(7), first[name].nan_to_num(7)), name
