# SPDX-License-Identifier: Apache-2.0
"""The C++ backend: its formulas, its independence of threads, and what happens without it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds import Adapprox
from adapprox_ds.adapprox import kernels
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.core.kernels import backends, native_build, squares
from adapprox_ds.core.kernels.native_build import NativeUnavailableError
from adapprox_ds.core.rounding import rounding_salt
from adapprox_ds.micro_adam.kernels import native_windows
from tests.adapprox import cases_small
from tests.adapprox.cases_kernels import (
    BRAIN,
    CODES,
    FULL,
    HALF,
    NIBBLES,
    Case,
    Data,
    check,
    check_bad_group,
    check_narrow_weights,
    check_small_means,
    dense,
    passes,
)
from tests.adapprox.test_kernels import FLOATS, KINDS, ROUNDINGS, SHAPES, held
from tests.world import fork


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is remembered of the compiler or of what was built, before or after."""
    caches = (native_build.load, backends._has_native, backends.missing)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


MOMENTS = st.sampled_from([None, FULL, BRAIN, CODES, NIBBLES])
SIZES = {"m": st.integers(1, 70), "n": st.integers(1, 300)}
WIDTHS = {"k": st.integers(1, 40), "w": st.integers(0, 40), "t": st.integers(0, 40)}
CASES = st.builds(
    Case,
    **{**SHAPES, **SIZES, **WIDTHS, **KINDS},
    moment=MOMENTS,
    dtype=FLOATS,
    rounding=ROUNDINGS,
).map(held)


@given(c=CASES, other=CASES)
@settings(max_examples=150, deadline=None)
def test_native_computes_the_formulas(c: Case, other: Case) -> None:
    """Of blocks of several shapes at a time."""
    check(native_pass, c, like(other, c))


def like(other: Case, c: Case) -> Case:
    """Another shape for the same step, without runs of its own."""
    names = ("write", "of_gradients", "nesterov", "largest", "ascend", "eps", "moment")
    names += ("dtype", "rounding")
    shared = {name: getattr(c, name) for name in names}
    return replace(other, **shared, runs=(), b=max(1, other.b))


@pytest.mark.parametrize(
    "c",
    [
        Case(2000, 130, 3, 8, 9, b=1, offset=0, skip=7, moment=CODES),
        Case(130, 2000, 3, 8, 9, b=1, missing=5, runs=(3, 500), write=False),
        Case(500, 257, 64, 69, 72, floor=False, moment=BRAIN),
        Case(1, 1, 1, 1, 1),
        Case(300, 129, 123, 128, 133, moment=None),
        # Several spans of columns, which begin elsewhere in a row that is cut, here within a pair.
        Case(40, 900, 64, 69, 72, skip=301, missing=33, moment=NIBBLES),
        Case(40, 900, 30, 33, 72, skip=300, missing=32),
        Case(40, 5000, 3, 8, 9, skip=100, missing=9, moment=CODES),
    ],
    ids=str,
)
@pytest.mark.parametrize("fastest", [False, True], ids=["fp32", "fastest"])
def test_bits_do_not_depend_on_threads(c: Case, fastest: bool, fresh: pytest.MonkeyPatch) -> None:
    """Sums are made by chunks of the shape's own, whoever computes them.

    With products in fp32, and with the fastest that this CPU has, which may be of bf16 numbers.
    """
    if fastest:
        fresh.delenv("CXXFLAGS")
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            d = Data(c)
            passed = passes(native_pass, [d])
            (made,) = passed.stacks
            found.append(
                [made.y, made.p, made.row_energies, made.squares, passed.squares, *d.flats]
            )
        check(native_pass, c, products=2**-8 if fastest else 3e-6)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.nan_to_num(7), same.nan_to_num(7))


def test_products_are_rounded_differently_in_each_step(fresh: pytest.MonkeyPatch) -> None:
    """Alike, the root would drift; and the test sketch is handed back as it was multiplied by."""
    fresh.delenv("CXXFLAGS")
    c, errors, with_theirs, with_ours = Case(64, 256, 3, 8, 9, b=1, write=False), [], [], []
    for step in range(1, 65):
        d = Data(c)
        d.s = replace(d.s, salt=rounding_salt(step))
        given = dense(d)
        (reduced,) = passes(native_pass, [d]).stacks
        errors.append(reduced.y[0].double() - given["y"][0])
        with_ours.append((reduced.p[0].double() - given["p"][0]).norm())
        with_theirs.append((reduced.p[0].double() - dense(d)["p"][0]).norm())
    one = torch.stack([e.norm() for e in errors]).mean()
    if one < 1e-5 * given["y"][0].norm():
        pytest.skip("this CPU's products are in fp32")
    assert torch.stack(errors).mean(0).norm() < 0.3 * one
    assert sum(with_theirs) < 0.85 * sum(with_ours)


def test_partial_sums_are_bounded() -> None:
    """A wide stack: chunks grow until all their projections fit."""
    d = Data(Case(4096, 512, 64, 68, 72, b=2))
    entry = native_pass._Stack()
    chunks, _, (_, p, *_) = native_pass._pack(entry, d.stack, d.s, 0)
    assert 1 < chunks == p.shape[1] and p.numel() <= native_pass._PARTIALS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_through(bad: float) -> None:
    check_bad_group(native_pass, bad)
    check_bad_group(native_pass, bad, NIBBLES)


@pytest.mark.parametrize("of_gradients", [True, False], ids=["gradients", "updates"])
@pytest.mark.parametrize("moment", [BRAIN, CODES, NIBBLES], ids=str)
@pytest.mark.parametrize(
    "sizes", [(40, 300, 0, 0), (9, 128, 0, 0), (3, 1, 0, 0), (1, 257, 5, 9), (30, 300, 150, 7)]
)
def test_small_first_moments(
    sizes: tuple[int, int, int, int], moment: torch.dtype, of_gradients: bool
) -> None:
    m, n, skip, missing = sizes
    shape = Case(m, n, 3, 5, 6, skip=skip, missing=missing, runs=(1, 300))
    check_small_means(native_pass, replace(shape, moment=moment, of_gradients=of_gradients))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_narrow_weights(dtype: torch.dtype, rounding: str) -> None:
    shape = Case(30, 300, 3, 5, 6, skip=150, missing=7, runs=(1, 300), dtype=dtype)
    check_narrow_weights(native_pass, replace(shape, rounding=rounding))


# --- Which backend, and what it takes to build ---------------------------------------------------


def backend(**of: Any) -> str:
    d = Data(replace(Case(6, 200, 3, 5, 6, runs=(4,)), **of))
    return kernels.backend([d.stack], d.runs)


def test_the_cpu_takes_native_where_it_can(fresh: pytest.MonkeyPatch) -> None:
    assert backend() == backend(moment=CODES) == backend(k=200, t=200) == "native"
    assert backend(dtype=BRAIN) == backend(dtype=HALF, moment=CODES) == "native"
    assert (
        backend(dtype=torch.float64)
        == backend(moment=HALF)
        == backend(factors=torch.float64)
        == "torch"
    )
    one, other = Data(Case(6, 9, 1, 1, 1)), Data(Case(6, 9, 1, 1, 1, moment=BRAIN))
    # All first moments of a pass are taken as the first one is kept.
    assert kernels.backend([one.stack, other.stack], None) == "torch"
    fresh.setenv(backends.VARIABLE, "native")
    assert backend() == "native"
    fresh.setenv(backends.VARIABLE, "torch")
    assert backend() == "torch"


def test_backends_agree_over_steps(fresh: pytest.MonkeyPatch) -> None:
    ends = []
    for choice in ("native", "torch"):
        fresh.setenv(backends.VARIABLE, choice)
        random = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(70, 90, generator=random)) for _ in range(3)]
        optimizer = Adapprox(params, lr=1e-2)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(70, 90, generator=random)
            optimizer.step()
        ends.append(torch.stack([p.detach() for p in params]))
    assert not torch.equal(*ends)  # both took part
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_small_matrices() -> None:
    """The kernels for sketches and for products give what algebra.py does."""
    cases_small.check_every_case("native")
    cases_small.check_a_step_of_nothing("native")


@pytest.mark.parametrize(
    "c",
    [
        cases_small.Case(2, 2100, 1025, 3, 5, 11, first=1),  # several spans
        cases_small.Case(2, 40, 33, 33, 33, 40),
        cases_small.Case(1, 300, 200, 64, 66, 72, first=1, known=False),
    ],
    ids=str,
)
def test_small_matrices_of_threads(c: cases_small.Case) -> None:
    """Bits do not depend on how many threads there are."""
    found, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found += cases_small.check("native", [c])
        finally:
            torch.set_num_threads(threads)
    # All but what torch computes.
    for name in ("x", "z", "sums", "s"):
        assert torch.equal(found[0][name], found[1][name]), name


def test_without_a_compiler(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain torch and one warning that names the remedy; an error where native was asked for."""
    fresh.delenv("CXX", raising=False)
    fresh.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert backend() == backend() == "torch"
    assert len(caplog.records) == 1 and "no C++ compiler was found" in caplog.text
    fresh.setenv(backends.VARIABLE, "native")
    with pytest.raises(RuntimeError, match="ADAPPROX_KERNELS=native, but no C.. compiler"):
        backend()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'fatal: no such thing' >&2; exit 1", "cannot compile.*no such thing"),
        ("exit 1", "cannot compile.*no message"),
        (None, "cannot be run.*set CXX"),
    ],
    ids=["fails", "fails silently", "is not there"],
)
def test_a_compiler_that_fails(
    script: str | None, message: str, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    with pytest.raises(NativeUnavailableError, match=message):
        native_build.load(native_pass.LIBRARY)
    assert not list((tmp_path / "built").rglob("*.so"))


def test_where_it_is_kept(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native_build.load(squares.LIBRARY)
    (built,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert built.parent == tmp_path / "adapprox_ds"
    written = built.stat().st_mtime_ns
    native_build.load.cache_clear()
    native_build.load(squares.LIBRARY)
    assert built.stat().st_mtime_ns == written
    native_build.load.cache_clear()
    taken = tmp_path / "a file"
    taken.touch()
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(taken))
    with pytest.raises(NativeUnavailableError, match="cannot be written.*TORCH_EXTENSIONS_DIR"):
        native_build.load(squares.LIBRARY)
    damaged = tmp_path / "damaged" / built.relative_to(tmp_path)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"cut short")
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "damaged"))
    with pytest.raises(NativeUnavailableError, match=f"{damaged} cannot be loaded.*remove it$"):
        native_build.load(squares.LIBRARY)


def build_in(folder: Path) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    native_build.load(squares.LIBRARY)


def test_ranks_that_build_at_once(tmp_path: Path) -> None:
    """None waits for another or reads half a file, and one file is left."""
    assert fork([partial(build_in, tmp_path)] * 3) == [0, 0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler by this name")
@pytest.mark.parametrize(
    "library",
    [native_pass.LIBRARY, native_windows.LIBRARY, squares.LIBRARY],
    ids=lambda library: library.name,
)
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
def test_compiles_for_other_instruction_sets(
    target: str, library: native_build.Library, tmp_path: Path
) -> None:
    """Without warnings; only what this CPU has is run, and the rest need not be fast."""
    if os.uname().machine != "x86_64":
        pytest.skip("instruction sets of x86-64")
    flags = [flag for flag in (*native_build._FLAGS, *library.flags) if "-march" not in flag]
    output = tmp_path / "native.so"
    files = [f"-I{native_build.SHARED}", str(library.files[0])]
    command = ["c++", *flags, f"-march={target}", "-Wall", "-Wextra", "-Werror", *files]
    subprocess.run([*command, "-O1", "-o", str(output)], check=True)
    assert output.stat().st_size > 0
