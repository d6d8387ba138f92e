# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's kernels: who takes a batch, what the C++ one computes, Triton's on a GPU or compiled.

What Triton's compute is tested with the other kernels too, in its interpreter (test_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds import MicroAdam
from adapprox_ds.core.kernels import backends
from adapprox_ds.micro_adam.batches import Flat, batches
from adapprox_ds.micro_adam.feedback import ErrorRows
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.kernels import native_windows, windows
from adapprox_ds.micro_adam.optimizer import _scalars
from adapprox_ds.micro_adam.state import new_stores
from adapprox_ds.micro_adam.step import Batch
from tests.micro_adam.cases_windows import (
    CASES,
    PARTS,
    SMALL,
    Case,
    check,
    check_optimizer,
    check_views,
    triton_step,
)


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the environment variable; nothing is remembered of devices before or after."""
    backends.missing.cache_clear()
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield lambda value: monkeypatch.setenv(backends.VARIABLE, value)
    backends.missing.cache_clear()


def batch(dtype: torch.dtype = torch.float32, group: int = 4, *, transposed: bool = False) -> Batch:
    """Two blocks of 8 elements."""
    w = torch.zeros(8, 2, dtype=dtype).mT if transposed else torch.zeros(2, 8, dtype=dtype)
    rows = ErrorRows(torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2))
    entries = torch.zeros(3, 2, 1)
    return Batch(w, torch.zeros_like(w), entries.to(torch.int16), entries.bfloat16(), rows, group)


@pytest.mark.parametrize(
    ("by", "given"),
    [
        ("native, triton", {}),
        ("native, triton", {"dtype": torch.bfloat16}),
        ("native, triton", {"dtype": torch.float16}),
        ("", {"dtype": torch.float64}),
        ("", {"group": 0}),
        ("", {"transposed": True}),
    ],
)
def test_kernels_take_what_they_can(
    by: str, given: dict[str, Any], variable: Callable[[str], None]
) -> None:
    """On a CPU, Triton only where it is asked for."""
    with mock.patch.object(backends, "missing", return_value=None):
        for choice in ("native", "triton"):
            variable(choice)
            assert windows.backend(batch(**given)) == (choice if choice in by else "torch")
        variable("auto")
        assert windows.backend(batch(**given)) == ("native" if "native" in by else "torch")
        variable("torch")
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
SCALARS = {"eps", "rate", "decay", "push", "kept"}


@pytest.mark.parametrize("size", COMPILED)
@pytest.mark.parametrize("name", ["accumulate", "keep", "update"])
def test_windows_compile_for_hopper(
    name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, without a GPU, with the barriers and the rounding that they need."""
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    from adapprox_ds.micro_adam.kernels import window_kernels, window_passes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    group, framed, dtype = COMPILED[size]
    kernel = getattr(window_kernels, f"{name}_kernel")
    made = window_passes.rows_of(41) if name == "update" else window_passes.tiles_of(group)
    constants: dict[str, Any] = {**made, "ASCEND": True, "AT_RANDOM": framed}
    options = {key: constants.pop(key) for key in made if key.islower()}
    if not framed:
        names = ("outside_ptr", "base_ptr", "first_ptr", "rest_ptr", "left_ptr")
        constants |= dict.fromkeys(names)
    kinds = dict.fromkeys(("w_ptr", "g_ptr"), f"*{dtype}")
    kinds |= {"codes_ptr": "*u8", "outside_ptr": "*u8", "base_ptr": "*i64"}
    kinds |= {"first_ptr": "*i64", "rest_ptr": "*i8"}
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
    "case",
    [*CASES.values(), Case(((0, 4096 * 3000), (100, 9000)), {}, steps=12)],
    ids=[*CASES, "large"],
)
def test_windows_on_cuda(case: Case) -> None:
    """The same window and error as in torch, and weights to rounding."""
    check(case, triton_step(), "cuda")


# --- C++ ------------------------------------------------------------------------------------------

#: Of equal magnitudes, as of numbers of 16 bits and of infinities, the choice is a backend's own.
NATIVE = {
    name: case
    for name, case in CASES.items()
    if case.dtype == torch.float32 and name != "too large"
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_windows(name: str) -> None:
    """The same window and error as in torch, and weights to rounding."""
    check(NATIVE[name], native_windows.update)


@given(
    fragments=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 700)), min_size=1, max_size=4),
    density=st.sampled_from([0.001, 0.01, 0.07, 0.3, 1.0]),
    block=st.integers(1, 9).map(lambda groups: 32 * groups),
    window=st.integers(1, 4),
    maximize=st.booleans(),
    alpha=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_native_windows_of_any_shape(
    fragments: list[tuple[int, int]],
    density: float,
    block: int,
    window: int,
    maximize: bool,
    alpha: float,
) -> None:
    knobs = {"density": density, "window": window, "maximize": maximize}
    knobs |= {"block_size": block, "quant_block_size": 32}
    knobs["alpha"] = 0.0 if density == 1.0 else alpha
    check(Case(tuple(fragments), knobs, steps=4), native_windows.update)


def test_native_optimizer() -> None:
    check_optimizer("native")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_views(backend: str) -> None:
    check_views(backend)


def test_native_takes_the_largest_of_equal_ones_too() -> None:
    """Whichever it takes, none is left that is larger, and what was taken is not left."""
    h = MicroHyperparameters(lr=0.03, **{**SMALL, "window": 1})
    layout = Case(((0, 1024),), {}).layout()
    g = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0)).mul_(4).round_()
    flat = Flat(torch.zeros_like(g), g.clone(), *new_stores(layout, h, g.dtype, "cpu"))
    for batch_ in batches([flat], 1 << 16):
        native_windows.update(batch_, _scalars(h, 1))
    places, values = (x[0].long() if i == 0 else x[0] for i, x in enumerate(flat.window.entries(0)))
    blocks = g[:1024].view(4, 256)
    assert all(len(set(row)) == len(row) for row in places.tolist())
    assert torch.equal(values.float(), blocks.gather(1, places))
    left = blocks.scatter(1, places, 0.0)
    assert (left.abs().amax(1) <= values.abs().amin(1)).all()
    error = flat.error.read(0, 1024, torch.float32).view(4, 256)
    assert (error - left).abs().max() <= left.abs().max() / 15 * 1.001


def test_native_bits_do_not_depend_on_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(check(Case(((0, 256 * 40), *PARTS), SMALL), native_windows.update)[1])
    finally:
        torch.set_num_threads(threads)
    for flat in found[1:]:
        one, other = ((f.window.indices, f.window.values, f.error.codes) for f in (found[0], flat))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(found[0].w.nan_to_num(), flat.w.nan_to_num())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_native_hides_nothing_that_is_not_finite(bad: float) -> None:
    """It is taken before all else, and its weight is NaN."""
    p = torch.nn.Parameter(torch.ones(2, 4096))
    p.grad = torch.rand(2, 4096)
    p.grad[1, 7] = bad
    MicroAdam([p], nonfinite="propagate").step()
    assert (~p.detach().isfinite()).nonzero().tolist() == [[1, 7]]
