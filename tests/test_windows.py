# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's kernels: who takes a batch, machine code for Hopper, and a GPU where there is one.

What they compute is tested with the other kernels, in Triton's interpreter (test_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from adapprox_ds import MicroAdam, kernels
from adapprox_ds.kernels import windows
from adapprox_ds.sparse.feedback import ErrorRows
from adapprox_ds.sparse.step import Batch
from tests.cases_windows import CASES, Case, check


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; nothing is remembered of devices before or after."""
    kernels._missing.cache_clear()
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield lambda value: monkeypatch.setenv(kernels.VARIABLE, value)
    kernels._missing.cache_clear()


def batch(dtype: torch.dtype = torch.float32, group: int = 4, *, transposed: bool = False) -> Batch:
    """Two blocks of 8 elements."""
    w = torch.zeros(8, 2, dtype=dtype).mT if transposed else torch.zeros(2, 8, dtype=dtype)
    rows = ErrorRows(torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2))
    entries = torch.zeros(3, 2, 1)
    return Batch(w, torch.zeros_like(w), entries.to(torch.int16), entries.bfloat16(), rows, group)


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        ("triton", {}),
        ("triton", {"dtype": torch.bfloat16}),
        ("triton", {"dtype": torch.float16}),
        ("torch", {"dtype": torch.float64}),
        ("torch", {"group": 0}),
        ("torch", {"transposed": True}),
    ],
)
def test_triton_takes_what_it_can(
    taken: str, given: dict[str, Any], variable: Callable[[str], None]
) -> None:
    """And only where it is asked for."""
    with mock.patch.object(kernels, "_missing", return_value=None):
        variable("triton")
        assert windows.backend(batch(**given)) == taken
        for other in ("auto", "native", "torch"):
            variable(other)
            assert windows.backend(batch(**given)) == "torch"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("cuda", ValueError, "ADAPPROX_KERNELS='cuda': allowed are auto, native, triton, torch"),
        ("triton", RuntimeError, "ADAPPROX_KERNELS=triton, but .* are on cpu"),
    ],
)
def test_what_cannot_be_is_refused(
    value: str, error: type[Exception], message: str, variable: Callable[[str], None]
) -> None:
    """By the step, before it changes anything."""
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    variable(value)
    with pytest.raises(error, match=message):
        MicroAdam([p]).step()
    assert torch.equal(p.detach(), torch.ones(5)) and torch.equal(p.grad, torch.ones(5))


#: Elements of a group, whether there are frames, and the dtype of weights and gradients.
COMPILED = {
    "usual": (128, False, "fp32"),
    "frames": (6, True, "bf16"),
    "wide": (32768, True, "fp16"),
}
SCALARS = {"eps", "rate", "decay"}


@pytest.mark.parametrize("size", COMPILED)
@pytest.mark.parametrize("name", ["accumulate", "keep", "update"])
def test_windows_compile_for_hopper(
    name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, without a GPU, with the barriers and the rounding that they need."""
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    from adapprox_ds.kernels import window_kernels, window_passes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    group, framed, dtype = COMPILED[size]
    kernel = getattr(window_kernels, f"{name}_kernel")
    made = window_passes.rows_of(41) if name == "update" else window_passes.tiles_of(group)
    constants: dict[str, Any] = {**made, "ASCEND": True}
    options = {key: constants.pop(key) for key in made if key.islower()}
    if not framed:
        constants |= {"outside_ptr": None, "base_ptr": None}
    kinds = dict.fromkeys(("w_ptr", "g_ptr"), f"*{dtype}")
    kinds |= {"codes_ptr": "*u8", "outside_ptr": "*u8", "base_ptr": "*i64"}
    kinds |= {"indices_ptr": "*i16", "values_ptr": "*bf16"}
    signature, known = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        pointer = argument.endswith("_ptr")
        default = "*fp32" if pointer else "fp32" if argument in SCALARS else "i32"
        signature[argument] = kinds.get(argument, default)
        if argument in constants:
            signature[argument] = "constexpr"
        elif pointer and not framed:
            known[(index,)] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    built = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    assert built.asm["cubin"]
    assert "div.rn.f32" in ptx and "fma" not in ptx, "other bits than the torch path's"
    assert "atom" not in ptx
    assert name != "update" or ptx.count("bar.sync") == 2, "threads run ahead of each other"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case", [*CASES.values(), Case(((0, 4096 * 3000), (100, 9000)), {}, steps=12)], ids=str
)
def test_windows_on_cuda(case: Case) -> None:
    """The same window and error as in torch, and weights to rounding."""
    check(case, "cuda")
