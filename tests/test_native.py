# SPDX-License-Identifier: Apache-2.0
"""The C++ backend: its formulas, its independence of threads, and what happens without it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds import Adapprox, kernels
from adapprox_ds.kernels import native_build, native_passes, tiles
from adapprox_ds.kernels.native_build import NativeUnavailableError
from adapprox_ds.lowrank.quantized import QuantizedMatrix, quantize
from adapprox_ds.lowrank.rounding import rounding_salt
from tests.cases_kernels import Case, Data, both_passes, check

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is remembered of the compiler or of what was built, before or after."""
    caches = (native_build.load, kernels._has_native, kernels._missing)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


CASES = st.builds(
    Case,
    m=st.integers(1, 70),
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    w=st.integers(1, 40),
    b=st.integers(1, 3),
    floor=st.booleans(),
    moment=st.booleans(),
    of_gradients=st.booleans(),
    nesterov=st.booleans(),
    clips=st.booleans(),
    largest=st.sampled_from([0.5, 1.5, math.inf]),
    ascend=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-3]),
    separate=st.booleans(),
    offset=st.integers(0, 9),
    transposed=st.booleans(),
)


@given(c=CASES)
@settings(max_examples=150, deadline=None)
def test_native_computes_the_formulas(c: Case) -> None:
    check(native_passes, c)


@pytest.mark.parametrize(
    "c",
    [
        Case(2000, 130, 3, 8, b=1, offset=0),
        Case(130, 2000, 3, 8, b=1),
        Case(500, 257, 64, 69, floor=False),
        Case(1, 1, 1, 1),
        Case(300, 129, 123, 128, moment=False),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_threads(c: Case) -> None:
    """Sums are made by chunks of the shape's own, whoever computes them."""
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(check(native_passes, c))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in found[0].items():
            pairs = (
                zip(value, other[name], strict=True)
                if isinstance(value, list)
                else [(value, other[name])]
            )
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs), name


def test_partial_sums_are_bounded() -> None:
    """Many threads and a wide sketch: chunks grow until their projections fit."""
    d = Data(Case(4096, 512, 64, 64, b=2))
    o = native_passes._Operands(d.view("g"), None, d.q, d.u, None, 64, d.s)
    assert 1 < o.chunks * 2 * 64 * o.padded <= native_passes._PARTIALS


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_comes_through(bad: float) -> None:
    d = Data(Case(20, 40, 3, 5, b=1))
    d.view("g")[0][3, 7] = bad
    reduced = both_passes(native_passes, d)
    assert not d.view("w")[0][3, 7].isfinite() and not reduced["update_square"].isfinite().any()
    assert not reduced["row_sums"][0, 3].isfinite() and not reduced["col_sums"][0, 7].isfinite()
    assert int((~d.view("w")[0].isfinite()).sum()) == 1


@pytest.mark.parametrize("of_gradients", [True, False], ids=["gradients", "updates"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize(("m", "n"), [(40, 300), (9, 128), (3, 1), (1, 257)])
def test_small_first_moments(kind: str, m: int, n: int, of_gradients: bool) -> None:
    """As the torch backend: read alike, the same weights, and written back to the same bits.

    But where the means that are rounded differ in their last bit, to a neighbour's.
    """
    d = Data(Case(m, n, 3, 5, b=2, of_gradients=of_gradients))
    means: dict[str, Any] = {}
    weights = {}
    for name, passes in (("native", native_passes), ("torch", tiles)):
        d = Data(d.c)
        d.s = replace(d.s, salt=rounding_salt(7))
        if kind == "bf16":
            kept: Any = [x.to(torch.bfloat16) for x in d.view("m")]
        else:
            kept = [QuantizedMatrix(*quantize(x)) for x in d.view("m")]
        one = passes.first_pass(d.view("g"), d.q, d.u, d.sketch, d.floor, d.s)
        passes.second_pass(
            *(d.view("w"), kept, d.view("g"), d.q, d.u, d.floor),
            *(d.basis, d.row_weights, d.clip, d.s),
        )
        means[name] = kept
        weights[name] = torch.stack([one.update_square.sum(), *torch.stack(d.view("w")).flatten()])
    torch.testing.assert_close(weights["native"], weights["torch"], rtol=1e-5, atol=2e-5)
    differ = 0
    for ours, theirs in zip(means["native"], means["torch"], strict=True):
        if kind == "bf16":
            a, b = (x.view(torch.int16).int() for x in (ours, theirs))
        else:
            a, b = ours.codes.int(), theirs.codes.int()
            torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0)
        assert int((a - b).abs().max()) <= 1
        differ += int((a != b).sum())
    assert differ <= max(2, 0.002 * 2 * m * n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_group_of_codes_is_not_hidden(bad: float) -> None:
    d = Data(Case(4, 300, 3, 5, b=1))
    d.view("g")[0][1, 200] = bad
    kept = [QuantizedMatrix(*quantize(x)) for x in d.view("m")]
    native_passes.second_pass(
        *(d.view("w"), kept, d.view("g"), d.q, d.u, d.floor),
        *(d.basis, d.row_weights, d.clip, d.s),
    )
    found = kept[0].load(0, 4)
    assert found[1, 128:256].isnan().all() and int(found.isnan().sum()) == 128


# --- Which backend, and what it takes to build ---------------------------------------------------


def backend(dtype: torch.dtype = torch.float32, rank: int = 3) -> str:
    d = Data(Case(6, 200, rank, rank, dtype=dtype))
    return kernels.backend([*d.view("w"), *d.view("g")], d.view("m"), d.q, d.basis)


def test_the_cpu_takes_native_where_it_can(fresh: pytest.MonkeyPatch) -> None:
    assert backend() == "native"
    assert backend(dtype=torch.bfloat16) == "torch"
    assert backend(rank=kernels.FUSED_LIMIT + 1) == "torch"
    fresh.setenv(kernels.VARIABLE, "native")
    assert backend() == "native"
    fresh.setenv(kernels.VARIABLE, "torch")
    assert backend() == "torch"


def test_backends_agree_over_steps(fresh: pytest.MonkeyPatch) -> None:
    ends = []
    for choice in ("native", "torch"):
        fresh.setenv(kernels.VARIABLE, choice)
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


def test_without_a_compiler(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain torch and one warning that names the remedy; an error where native was asked for."""
    fresh.delenv("CXX", raising=False)
    fresh.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert backend() == backend() == "torch"
    assert len(caplog.records) == 1 and "no C++ compiler was found" in caplog.text
    fresh.setenv(kernels.VARIABLE, "native")
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
        native_build.load("native")
    assert not list((tmp_path / "built").rglob("*.so"))


def test_where_it_is_kept(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native_build.load("native")
    (built,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert built.parent == tmp_path / "adapprox_ds"
    written = built.stat().st_mtime_ns
    native_build.load.cache_clear()
    native_build.load("native")
    assert built.stat().st_mtime_ns == written
    native_build.load.cache_clear()
    taken = tmp_path / "a file"
    taken.touch()
    fresh.setenv("TORCH_EXTENSIONS_DIR", str(taken))
    with pytest.raises(NativeUnavailableError, match="cannot be written.*TORCH_EXTENSIONS_DIR"):
        native_build.load("native")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    code = "from adapprox_ds.kernels import native_build; native_build.load('native')"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    (built,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    built.write_bytes(b"cut short")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode and f"NativeUnavailableError: {built} cannot be loaded" in done.stderr
    assert done.stderr.strip().endswith("remove it")


def test_ranks_that_build_at_once(tmp_path: Path) -> None:
    """None waits for another or reads half a file, and one file is left."""
    code = (
        "import torch, adapprox_ds; p = torch.nn.Parameter(torch.ones(9, 9))\n"
        "o = adapprox_ds.Adapprox([p]); p.grad = torch.ones(9, 9); o.step()\n"
    )
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), kernels.VARIABLE: "native"}
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=env) for _ in range(3)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler by this name")
@pytest.mark.parametrize("library", native_build.LIBRARIES)
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
def test_compiles_for_other_instruction_sets(target: str, library: str, tmp_path: Path) -> None:
    """Without warnings; only what this CPU has is run."""
    if os.uname().machine != "x86_64":
        pytest.skip("instruction sets of x86-64")
    (file, *_), own = native_build.LIBRARIES[library]
    flags = [flag for flag in (*native_build._FLAGS, *own) if not flag.startswith("-march")]
    output = tmp_path / "native.so"
    source = str(Path(native_build.__file__).with_name(file))
    command = ["c++", *flags, f"-march={target}", "-Wall", "-Wextra", "-Werror", source]
    subprocess.run([*command, "-o", str(output)], check=True)
    assert output.stat().st_size > 0
