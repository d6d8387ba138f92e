# SPDX-License-Identifier: Apache-2.0
"""The backends of the pass against one dense computation, and which of them is taken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds.adapprox import kernels
from adapprox_ds.adapprox.kernels import tiles
from adapprox_ds.core.kernels import backends
from tests import ROOT
from tests.adapprox.cases_kernels import (
    BRAIN,
    CHECKS,
    CODES,
    FULL,
    HALF,
    NIBBLES,
    Case,
    Data,
    check,
    passes,
)

# --- The torch backend ---------------------------------------------------------------------------

FLOATS = st.sampled_from([FULL, BRAIN, HALF])
ROUNDINGS = st.sampled_from(["nearest", "stochastic", "compensated"])
#: Of any shape; what ZeRO cuts off the first and the last row leaves something of both.
SHAPES = {
    "m": st.integers(1, 40),
    "n": st.integers(1, 40),
    "k": st.integers(1, 9),
    "w": st.integers(0, 9),
    "t": st.integers(0, 9),
    "b": st.integers(0, 3),
    "skip": st.integers(0, 300),
    "missing": st.integers(0, 300),
    "runs": st.lists(st.integers(1, 300), max_size=3).map(tuple),
}
KINDS = {
    **dict.fromkeys(("write", "floor", "of_gradients", "nesterov", "clips"), st.booleans()),
    **dict.fromkeys(("ascend", "separate", "transposed"), st.booleans()),
    "largest": st.sampled_from([0.5, 1.5, math.inf]),
    "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
    **dict.fromkeys(("offset", "gap"), st.integers(0, 9)),
}


def held(c: Case) -> Case:
    """The case with no more cut off than there is, and something to do."""
    room = c.n - 1 if c.m > 1 else (c.n - 1) // 2
    c = replace(c, skip=min(c.skip, room), missing=min(c.missing, room))
    return c if c.b or c.runs else replace(c, b=1)


CASES = st.builds(
    Case,
    **SHAPES,
    **KINDS,
    moment=st.sampled_from([None, FULL, BRAIN, HALF, CODES, NIBBLES]),
    dtype=FLOATS,
    rounding=ROUNDINGS,
    factors=st.sampled_from([FULL, torch.float64]),
).map(held)


@given(c=CASES, tile=st.sampled_from([1, 64, 1 << 16]))
@settings(max_examples=150, deadline=None)
def test_tiles_compute_the_formulas(c: Case, tile: int) -> None:
    with mock.patch.object(backends, "_CPU_TILE", tile):
        check(tiles, c)


# --- Which backend -------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def backend(device: torch.device = CUDA, **of: Any) -> str:
    """The backend of a pass, as if its tensors were on a device."""
    d = Data(replace(Case(6, 20, 3, 5, 6), **of))
    chosen = backends.chosen
    with mock.patch.object(kernels, "chosen", lambda _, library: chosen(device, library)):
        return kernels.backend([d.stack] if d.c.b else [], d.runs)


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; nothing is remembered of devices before or after."""
    backends.missing.cache_clear()
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield lambda value: monkeypatch.setenv(backends.VARIABLE, value)
    backends.missing.cache_clear()


MOST = kernels.FUSED_LIMIT


@pytest.mark.parametrize(
    ("of", "fused"),
    [
        ({"k": 1, "w": 0, "t": 0}, True),
        ({"dtype": BRAIN, "moment": CODES}, True),
        ({"dtype": HALF, "moment": HALF, "runs": (3,), "b": 0}, True),
        ({"m": 200, "n": 200, "k": MOST, "w": MOST, "t": MOST}, True),
        ({"m": 200, "n": 200, "t": MOST + 1}, False),
        ({"factors": torch.float64}, False),
        ({"moment": torch.float64}, False),
        ({"dtype": torch.float64, "runs": (3,), "b": 0}, False),
    ],
    ids=str,
)
def test_triton_takes_what_it_can_fuse(
    of: dict[str, Any], fused: bool, variable: Callable[[str], None]
) -> None:
    """Where it can run; torch where that is asked for."""
    with mock.patch.object(backends, "missing", return_value=None):
        assert backend(**of) == ("triton" if fused else "torch")
        variable("triton")
        assert backend(**of) == ("triton" if fused else "torch")
        variable("torch")
        assert backend(**of) == "torch"


@pytest.mark.parametrize("value", ["", "Triton", "cuda"])
def test_a_bad_variable_is_refused(value: str, variable: Callable[[str], None]) -> None:
    variable(value)
    with pytest.raises(ValueError, match=f"ADAPPROX_KERNELS='{value}'.*triton, torch"):
        backend(CPU)


def test_triton_where_it_cannot_run_is_refused(variable: Callable[[str], None]) -> None:
    variable("triton")
    with pytest.raises(RuntimeError, match="ADAPPROX_KERNELS=triton, but .* are on cpu"):
        passes(kernels, [Data(Case(4, 5, 1, 2, 2))])


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "compute capability 8.0"), ((9, 0), "cannot be imported")]
)
def test_devices_without_triton(
    capability: tuple[int, int], reason: str, variable: Callable[[str], None]
) -> None:
    """They take torch, unless Triton is asked for."""
    hidden = dict.fromkeys(("triton", "adapprox_ds.adapprox.kernels.triton_pass"))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.dict(sys.modules, hidden),
    ):
        assert backend() == "torch"
        variable("triton")
        with pytest.raises(RuntimeError, match=reason):
            backend()


def test_import_and_a_step_on_the_cpu_do_without_triton() -> None:
    code = (
        "import sys, torch, adapprox_ds; before = 'triton' in sys.modules\n"
        "p = torch.nn.Parameter(torch.ones(8, 8)); o = adapprox_ds.Adapprox([p])\n"
        "p.grad = torch.ones(8, 8); o.step()\n"
        # torch itself imports Triton once an optimizer is made.
        "sys.exit(before or 'adapprox_ds.adapprox.kernels.triton_pass' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != backends.VARIABLE}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


# --- The Triton backend without a GPU: interpreted, and compiled ---------------------------------


@pytest.fixture(scope="module")
def interpreter() -> dict[str, str]:
    """Name of a check -> what went wrong, from a process that interprets Triton."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux alone)")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop(backends.VARIABLE, None)
    command = [sys.executable, "-m", "tests.adapprox.cases_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_triton_interpreted(name: str, interpreter: dict[str, str]) -> None:
    assert not interpreter[name], interpreter[name]


#: Rank, width and tests; dtypes of gradients, weights and first moment; what differs.
COMPILED: dict[str, tuple[tuple[int, int, int], tuple[torch.dtype | None, ...], dict]] = {
    "usual": ((8, 12, 16), (BRAIN, FULL, FULL), {"OF_GRADIENTS": True, "ALIGNED": True}),
    "reads": ((8, 12, 16), (FULL, None, None), {"WRITE": False}),
    "codes": ((8, 0, 16), (FULL, FULL, CODES), {}),
    "wide": ((128, 132, 136), (FULL, BRAIN, BRAIN), {"AT_RANDOM": True}),
    "nibbles": ((8, 12, 16), (BRAIN, BRAIN, NIBBLES), {"AT_RANDOM": True}),
    "narrow": ((8, 12, 16), (HALF, HALF, CODES), {"AT_RANDOM": True, "REST": CODES}),
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    """A kernel down to machine code, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    options = {x: constants.pop(x) for x in ("num_warps", "num_stages") if x in constants}
    names = kernel.arg_names
    kinds = {"salt": "i32", "weight_salt": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = {x: kinds.get(x, "*i64" if x.endswith("_ptr") else "fp32") for x in names}
    known = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("name", "capability"), [*((name, 90) for name in COMPILED), ("usual", 80), ("codes", 80)]
)
def test_triton_compiles(
    name: str,
    capability: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter lets pass what the compiler refuses."""
    tl = pytest.importorskip("triton.language", reason="Triton is not installed")
    from adapprox_ds.adapprox.kernels import triton_kernels, triton_pass, triton_tables

    # Of all cases, some of which have a kernel in common.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    columns, dtypes, differs = COMPILED[name]
    kinds = (None if x is None else triton_pass._TYPES[x] for x in dtypes)
    constants = {
        **dict(zip("GWM", kinds, strict=True)),
        **dict.fromkeys(("OF_GRADIENTS", "ALIGNED", "AT_RANDOM"), False),
        "REST": None,
        "WRITE": True,
    }
    constants |= differs
    constants["REST"] = tl.int8 if constants["REST"] else None
    coded = constants["M"] in (tl.int8, tl.uint8)
    own = {"OFFSET": tl.int32, "TF32": True, **triton_pass.slices_of(*columns)}
    own |= triton_pass.tile_of(coded)
    built = compiled(triton_kernels.pass_kernel, constants | own, capability)
    ptx = built.asm["ptx"]
    cores = "wgmma" if capability == 90 and own["ROWS"] == 64 else "mma.sync"
    assert cores in ptx and built.asm["cubin"], "no tensor cores"
    if constants["ALIGNED"]:
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx
    found = [built]
    names = ("G", "W", "M", "REST", "AT_RANDOM", "OF_GRADIENTS", "WRITE")
    shared = {x: constants[x] for x in names}
    found.append(compiled(triton_kernels.run_kernel, {**shared, "ROWS": 8}, capability))
    sums = {"KIND": tl.float32, **triton_tables._SUM}
    found.append(compiled(triton_kernels.sum_kernel, sums, capability))
    for each in found:
        assert "atom" not in each.asm["ptx"], "sums that depend on the order of programs"
        # What small GPUs have for one program.
        assert each.metadata.shared <= 99 * 1024


# --- The Triton backend on a GPU -----------------------------------------------------------------

ON_CUDA = Case(1000, 3072, 8, 13, 16, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "c",
    [
        ON_CUDA,
        replace(ON_CUDA, m=4096, n=1024, k=1, w=6, t=9, offset=0, gap=0, runs=(5000, 3)),
        replace(ON_CUDA, m=5025, n=768, k=16, w=21, floor=False, transposed=True, skip=700),
        replace(ON_CUDA, m=2048, n=2048, b=3, k=64, w=69, t=72, dtype=BRAIN),
        replace(ON_CUDA, m=768, n=768, b=40, offset=0, gap=32, of_gradients=False),
        replace(ON_CUDA, m=2048, n=4096, b=5, k=4, w=9, t=12, separate=True, write=False),
        replace(ON_CUDA, b=1, k=123, w=128, t=133, moment=BRAIN, missing=5),
        replace(ON_CUDA, m=1, n=5000, k=1, w=1, t=1, eps=0.0, moment=None),
        replace(ON_CUDA, m=999, moment=CODES, dtype=HALF, ascend=True, skip=4, runs=(300,)),
    ],
    ids=str,
)
def test_triton_on_cuda(c: Case, variable: Callable[[str], None]) -> None:
    """Both backends agree with the formulas, so with each other; bits repeat; nothing waits."""
    variable("triton")
    assert kernels.backend([Data(c).stack], None) == "triton"
    check(tiles, c)
    first = check(kernels, c)
    d = Data(c)
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes(kernels, [d])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, check(kernels, c), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
