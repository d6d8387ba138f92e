# SPDX-License-Identifier: Apache-2.0
"""What is known of Triton's kernels without a GPU: ptxas' report of each form of each kernel.

``python -m tests.gpu.static`` (``make gpu-static``) compiles every form for sm_80, sm_90 and sm_100
with the ptxas that Triton brings, and writes the table of the kernels' README. Launch arguments
are those of the package's own launches, recorded in place of the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch

from adapprox_ds import MicroAdam
from adapprox_ds.adapprox import small
from adapprox_ds.adapprox.kernels import forms
from adapprox_ds.adapprox.kernels.interface import StepScalars
from adapprox_ds.core.kernels import self_check
from tests import ROOT

README = ROOT / "adapprox_ds" / "adapprox" / "kernels" / "README.md"
BEGIN, END = "<!-- ptxas: begin -->", "<!-- ptxas: end -->"
FULL, BRAIN, HALF, CODES = torch.float32, torch.bfloat16, torch.float16, torch.int8
SHORT = {FULL: "fp32", BRAIN: "bf16", HALF: "fp16", CODES: "codes", None: "none"}
#: Bytes of shared memory that an SM has; 64 Ki registers and 64 warps have all of these.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
#: Ranks with the sketches that the defaults make of them.
WIDE = {k: (k, k + 2, k + 8) for k in (8, 16, 32, 64, 128)}


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given, **constants: self.launches.append(
            Launch(self.kernel, given, constants)
        )


@dataclass
class Launch:
    """A kernel with its arguments."""

    kernel: Any
    given: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> str:
        """What is compiled."""
        return f"{self.name} {self.signature} {self.constants}"

    @property
    def signature(self) -> dict[str, str]:
        from triton.runtime.jit import mangle_type

        kinds = dict.fromkeys(self.constants, "constexpr")
        for name, x in zip(self.kernel.arg_names, self.given, strict=False):
            kinds[name] = "constexpr" if x is None else mangle_type(x)
        return {name: kinds[name] for name in self.kernel.arg_names}

    def compile(self, capability: int) -> Built:
        """Down to machine code, without a GPU, whatever was compiled before."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = self.kernel.arg_names
        constants = {k: v for k, v in self.constants.items() if k in names}
        options = {k: v for k, v in self.constants.items() if k not in names}
        pairs = list(zip(names, self.given, strict=False))
        constants |= {name: None for name, x in pairs if x is None}
        aligned = [
            (i,)
            for i, (_, x) in enumerate(pairs)
            if hasattr(x, "data_ptr") and not x.data_ptr() % 16
        ]
        attributes = {i: [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(self.kernel, self.signature, constants, attributes)
        said = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1"),
            contextlib.redirect_stdout(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return Built.of(capability, made, said.getvalue())


@dataclass(frozen=True)
class Built:
    """What ptxas reports of a kernel.

    Attributes:
        capability: 80, 90 or 100.
        registers: of a thread.
        spilled: bytes of a thread's registers that lie in local memory.
        shared: bytes of a program's shared memory.
        warps: of a program.
        ptx: what ptxas was given.
    """

    capability: int
    registers: int
    spilled: int
    shared: int
    warps: int
    ptx: str = field(repr=False, compare=False)

    @classmethod
    def of(cls, capability: int, made: Any, report: str) -> Built:
        used = re.search(r"Used (\d+) registers", report)
        spilled = re.search(r"(\d+) bytes stack frame, \d+ bytes spill stores", report)
        assert used and spilled and made.asm["cubin"], report
        data = made.metadata
        return cls(
            capability, int(used[1]), int(spilled[1]), data.shared, data.num_warps, made.asm["ptx"]
        )

    @property
    def resident(self) -> int:
        """Warps that an SM holds at once, of 64."""
        # Registers are given in units of 256 a warp, in each of the SM's four parts.
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * (65536 // 4 // of_warp) // self.warps
        by_shared = SHARED[self.capability] // (-(-(self.shared + 1024) // 128) * 128)
        programs = min(by_registers, by_shared, 64 // self.warps, 32)
        return programs * self.warps

    def __str__(self) -> str:
        return f"{self.registers}, {self.spilled}, {self.shared >> 10} KB, {self.resident}"


@dataclass(frozen=True)
class Form:
    """A pass of the step over an example; see :mod:`adapprox_ds.adapprox.kernels.forms`.

    Attributes:
        g, w, mean: dtypes; ``CODES`` for codes, None for no first moment.
        k: rank of the factors.
        of_gradients: what the first moment is the mean of.
        sketches: whether the pass makes R x; it does not after one that only looked.
        write: whether the pass updates, or only looks.
        aligned: whether rows lie at multiples of 16 bytes.
        long: whether places take 64 bits.
        runs: whether it is of dense second moments.
    """

    g: torch.dtype = FULL
    w: torch.dtype = FULL
    mean: torch.dtype | None = FULL
    k: int = 8
    of_gradients: bool = True
    sketches: bool = True
    write: bool = True
    aligned: bool = True
    long: bool = False
    runs: bool = False

    @property
    def words(self) -> str:
        parts = ["runs"] if self.runs else [f"k = {self.k}"]
        if self.write:
            parts.append(f"first moment {SHORT[self.mean]}")
            parts += [f"weights {SHORT[self.w]}"] * (self.w != FULL)
        parts += [f"gradients {SHORT[self.g]}"] * (self.g != FULL)
        flags = {"of updates": self.of_gradients, "after a pass that looks": self.sketches}
        flags |= {"only looks": self.write, "not aligned": self.aligned, "long rows": not self.long}
        return ", ".join([*parts, *(name for name, usual in flags.items() if not usual)])

    @property
    def wide(self) -> tuple[int, int, int]:
        """Columns of factors, sketch and test sketch."""
        k, width, tests = WIDE[self.k]
        return (k, width, tests) if self.sketches else (k, 0, width)

    @property
    def scalars(self) -> StepScalars:
        decay = 0.9 if self.mean else 0.0
        return StepScalars(decay, 0.999, 1.0, 1.0, 1e-8, 1e-3, 0.1, False, self.of_gradients, True)

    def check(self, device: torch.device) -> str | None:
        """Compare it with torch on a device, as the self-check does: what is wrong, or None."""
        of = (self.g, self.w, self.mean, device)
        stack = None if self.runs else forms._stack(self.wide, 528, *of)
        runs = forms._runs(*of) if self.runs else None
        self_check._verdicts.clear()
        forms.takes([] if stack is None else [stack], runs, self.scalars, self.write)
        (reason,) = self_check._verdicts.values()
        return reason

    def launches(self) -> list[Launch]:
        """What the package launches for it."""
        from adapprox_ds.adapprox.kernels import triton_pass, triton_tables

        of = (self.g, self.w, self.mean, torch.device("cpu"))
        s = self.scalars
        found: list[Launch] = []
        with recorded(triton_pass, found), recorded(triton_tables, found):
            if self.runs:
                triton_pass.run([], forms._runs(*of), s, self.write)
            else:
                stack = forms._stack(self.wide, 528 if self.aligned else 531, *of)
                triton_pass.run([stack], None, s, self.write, long=self.long)
        return found


@dataclass(frozen=True)
class Small:
    """The small algebra of a step over an example; see :mod:`adapprox_ds.adapprox.small`.

    Attributes:
        size: the side of tiles.
        kept: the dtype of factors.
        kernel: the one that the README's table shows.
    """

    size: int
    kept: torch.dtype = FULL
    kernel: str = "solve_kernel"

    @property
    def words(self) -> str:
        return f"{self.kernel.removesuffix('_kernel').replace('_', ' ')}, {self.size} columns"

    def check(self, device: torch.device) -> str | None:
        """See :class:`Form`."""
        return small._compare(self.size, self.kept, device)

    def launches(self) -> list[Launch]:
        """What the package launches for it, the kernel that the table shows first."""
        from adapprox_ds.adapprox.kernels import triton_small_kernels, triton_tables

        found: list[Launch] = []
        with recorded(triton_small_kernels, found), recorded(triton_tables, found):
            self.check(torch.device("cpu"))
        return sorted(found, key=lambda launch: launch.name != self.kernel)


@contextlib.contextmanager
def recorded(module: Any, found: list[Launch]) -> Iterator[None]:
    """Keep what a module's kernels are launched with, in place of the launches."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    with mock.patch.multiple(module, **{x: Recorder(getattr(module, x), found) for x in names}):
        yield


def window_launches(dtype: torch.dtype, block: int) -> list[Launch]:
    """MicroAdam's, of whole blocks and of frames."""
    from adapprox_ds.micro_adam.kernels import window_passes, windows

    found: list[Launch] = []
    p = torch.nn.Parameter(torch.zeros(3 * block + 40, dtype=dtype))
    p.grad = torch.ones_like(p)
    with (
        recorded(window_passes, found),
        mock.patch.object(windows, "chosen", lambda *_: "triton"),
        mock.patch.object(windows, "takes", lambda *_: True),
    ):
        MicroAdam([p], block_size=block).step()
    return found


#: Of the README's table: the kernels that most steps run, then larger ranks and what is rare.
MAIN = [Form(mean=mean) for mean in (FULL, BRAIN, CODES)]
SMALL = [
    *(Small(size) for size in (16, 32)),
    *(Small(32, kernel=x) for x in ("row_product_kernel", "column_product_kernel")),
]
SHOWN: list[Form | Small] = [
    *MAIN,
    Form(mean=None),
    Form(g=BRAIN, w=BRAIN),
    Form(sketches=False),
    Form(write=False),
    Form(aligned=False),
    Form(long=True),
    *(Form(k=k, mean=mean) for k in (16, 32, 64, 128) for mean in (FULL, CODES)),
    Form(runs=True),
    *SMALL,
]


def every_form() -> Iterator[Form | Small]:
    """Every form that differs in what is compiled, the table's first."""
    yield from SHOWN
    kinds = [(FULL, FULL), (BRAIN, FULL), (HALF, FULL), (BRAIN, BRAIN), (HALF, HALF)]
    for g, w in kinds:
        for mean in (FULL, BRAIN, CODES, None):
            for of_gradients in (True, False) if mean else (True,):
                of = partial(Form, g, w, mean, of_gradients=of_gradients)
                yield of(runs=True)
                for aligned in (True, False):
                    for sketches in (True, False):
                        yield of(sketches=sketches, aligned=aligned)
    for g in (FULL, BRAIN, HALF):
        yield Form(g, write=False, runs=True)
        for aligned in (True, False):
            yield Form(g, write=False, aligned=aligned)
    for k in WIDE:
        for mean in (FULL, BRAIN, CODES, None):
            yield Form(mean=mean, k=k, sketches=False)
            yield Form(mean=mean, k=k)
        yield Form(k=k, write=False)
    for mean in (FULL, BRAIN, CODES, None):
        yield Form(mean=mean, long=True)
    yield Form(write=False, long=True)
    for size in (16, 32):
        for kept in (FULL, BRAIN):
            yield Small(size, kept)


#: What this process has compiled.
_known: dict[tuple[str, int], Built] = {}


def report(form: Form | Small | tuple[torch.dtype, int], capability: int) -> dict[str, Built]:
    """By kernel, what those launches of a form compile to that were not seen before.

    Raises:
        AssertionError: a kernel is not what the package promises of all.
    """
    launches = window_launches(*form) if isinstance(form, tuple) else form.launches()
    found = {}
    for launch in launches:
        if (launch.key, capability) in _known:
            continue
        built = _known[launch.key, capability] = launch.compile(capability)
        assert "atom" not in built.ptx, "sums that depend on the order of programs"
        # What small GPUs have for one program.
        assert built.shared <= 99 << 10, f"{built.shared} bytes of shared memory"
        found[launch.key] = built
    return found


def main_kernel(form: Form | Small, capability: int) -> Built:
    """Of the kernel that a form is about, and not the sums behind it."""
    launch = form.launches()[0]
    return launch.compile(capability)


def header() -> str:
    import triton

    return f"Triton {triton.__version__}'s ptxas"


def table(found: dict[tuple[Form | Small, int], Built]) -> str:
    """The README's table."""
    lines = [
        f"{header()}: registers of a thread, bytes that a thread spills, shared memory of a "
        "program, and warps that an SM holds at once, of 64.",
        "",
        "| pass | sm_80 | sm_90 | sm_100 |",
        "|---|---|---|---|",
    ]
    for form in SHOWN:
        cells = " | ".join(str(found[form, capability]) for capability in SHARED)
        lines.append(f"| {form.words} | {cells} |")
    return "\n".join(lines)


def _job(job: tuple[Any, int, bool]) -> tuple[Any, int, Any]:
    form, capability, shown = job
    torch.set_num_threads(1)
    try:
        return (
            form,
            capability,
            main_kernel(form, capability) if shown else report(form, capability),
        )
    except Exception as error:
        return form, capability, f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.gpu.static")
    parser.add_argument("--table", action="store_true", help="only what the README shows")
    given = parser.parse_args(arguments)
    every: list[Any] = list(dict.fromkeys(every_form()))
    every += [(dtype, block) for dtype in (FULL, BRAIN, HALF) for block in (256, 4096, 32768)]
    jobs = [(form, capability, True) for form in SHOWN for capability in SHARED]
    if not given.table:
        jobs += [(form, capability, False) for form in every for capability in SHARED]
    found, failed, most = {}, 0, 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for form, capability, built in pool.imap_unordered(_job, jobs):
            words = f"MicroAdam {form}" if isinstance(form, tuple) else form.words
            if isinstance(built, str):
                failed += 1
                print(f"sm_{capability} {words}: {built}", flush=True)
            elif isinstance(built, Built):
                found[form, capability] = built
                print(f"sm_{capability} {words}: {built}", flush=True)
            else:
                most += len(built)
                print(f"sm_{capability} {words}: {len(built)} kernels", flush=True)
    if not failed:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")
    print(f"{most} kernels compiled for {', '.join(map(str, SHARED))}, {failed} forms failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
