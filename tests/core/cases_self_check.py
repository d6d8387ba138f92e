# SPDX-License-Identifier: Apache-2.0
"""Cases of the kernels' self-check; run as a program, in Triton's interpreter."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.adapprox import small
from adapprox_ds.adapprox.kernels import forms
from adapprox_ds.core.kernels import backends, self_check
from tests import interpreted
from tests.adapprox import cases_small

TORCH, TRITON = {backends.VARIABLE: "torch"}, {backends.VARIABLE: "triton"}


class Refusing:
    """In place of a kernel: one that does not compile."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            raise TypeError("at 3:5: no such type\nand more")

        return launch


class Idle:
    """In place of a kernel: one that does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


def train(kind: Any, environment: dict[str, str], **settings: Any) -> tuple[Tensor, Any, list[str]]:
    """Some steps as on a device where Triton is the choice: weights, metrics and warnings."""
    random = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(x, generator=random)) for x in ((70, 90), (90, 70), (40,))
    ]
    optimizer = kind(params, lr=1e-2, **settings)
    self_check._verdicts.clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    self_check._log.addHandler(handler)
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(backends, "automatic", lambda device, library: "triton"),
        ):
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=random)
                optimizer.step()
            metrics = optimizer.metrics()
    finally:
        self_check._log.removeHandler(handler)
    return torch.cat([p.detach().flatten() for p in params]), metrics, said


def check_right(kind: Any, **settings: Any) -> None:
    """Right kernels pass without a word and then step; nothing of it moves the run's numbers."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    # A tile and a part of one, of codes a whole group and a part of one.
    cols = (144, 131) if settings.get("first_moment") == "int8" else (48, 35)
    few = mock.patch.multiple(forms, _ROWS=40, _COLS=cols, _RUN=1100)
    with few, mock.patch.object(small, "_EXAMPLE", (1, 40, 30)), ExitStack() as more:
        if settings:
            more.enter_context(cases_small.in_torch())
        end, metrics, said = train(kind, {}, **settings)
        assert torch.equal(before, torch.get_rng_state())
        assert metrics.kernels and set(metrics.kernels.values()) == {"triton"}, metrics.kernels
        assert not said, said
        assert torch.equal(end, train(kind, TRITON, **settings)[0])
        assert not self_check._verdicts, "what is asked for is not checked"


def check_wrong(kind: Any, module: Any, name: str, broken: Any, words: str) -> None:
    """A kernel that fails is not used: the run is torch's, with one warning for each form."""
    # Small, for the interpreter.
    few = mock.patch.multiple(forms, _ROWS=20, _COLS=(37,), _RUN=200)
    fewer = mock.patch.object(small, "_EXAMPLE", (1, 30, 20))
    with few, fewer, mock.patch.object(module, name, broken), ExitStack() as more:
        if name in ("pass_kernel", "run_kernel"):
            more.enter_context(cases_small.in_torch())
        end, metrics, said = train(kind, {})
        failed = [x for x in metrics.kernels.values() if x != "triton"]
        assert failed and all(x.startswith("torch: ") and words in x for x in failed), failed
        assert len(said) == len(failed) and all("report" in x and words in x for x in said), said
    torch.testing.assert_close(end, train(kind, TORCH)[0], rtol=1e-5, atol=1e-5)


def check_seen(module: Any, name: str) -> None:
    """The comparison of the small algebra sees that one of its kernels does nothing."""
    fewer = mock.patch.object(small, "_EXAMPLE", (1, 30, 20))
    with fewer, mock.patch.object(module, name, Idle()):
        words = small._compare(16, torch.float32, torch.device("cpu"))
    assert words is not None and "differ from torch's" in words, words


class RefusingLong:
    """In place of a kernel: one that cannot be compiled with places in 64 bits."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            assert str(constants["OFFSET"]) != "int64", "no room"
            self.kernel[grid](*arguments, **constants)

        return launch


def check_long() -> None:
    """Rows that need places in 64 bits have a form of their own, which is what is checked."""
    from adapprox_ds.adapprox.kernels import triton_pass

    few = mock.patch.multiple(forms, _ROWS=20, _COLS=(37,), _RUN=200)
    broken = mock.patch.object(triton_pass, "pass_kernel", RefusingLong(triton_pass.pass_kernel))
    with few, broken, cases_small.in_torch():
        short = train(Adapprox, {})[1].kernels
        assert set(short.values()) == {"triton"} and not any("long" in x for x in short), short
        with mock.patch.object(triton_pass, "_LARGEST", 1):
            found = train(Adapprox, {})[1].kernels
    long = {form: why for form, why in found.items() if "matrices" in form}
    assert long and all(form.endswith(" long") for form in long), found
    assert set(long.values()) == {"torch: AssertionError: no room"}, found


def check_forced(kind: Any, module: Any, name: str) -> None:
    with mock.patch.object(module, name, Refusing()):
        try:
            train(kind, TRITON)
        except TypeError as error:
            assert "no such type" in str(error)
        else:
            raise AssertionError("what is asked for was given up without an error")


def check_bound() -> None:
    """One row of a result left out is seen, and so is NaN; rounding is not."""
    want = {"y": torch.randn(70, 13)}
    assert self_check.differing({"y": want["y"] * (1 + 1e-5)}, want) is None
    for bad in (0.0, float("nan")):
        got = want["y"].clone()
        got[3] = bad
        assert self_check.differing({"y": got}, want) is not None


def modules() -> dict[str, Callable[[], None]]:
    from adapprox_ds.adapprox.kernels import triton_pass, triton_small_kernels, triton_tables
    from adapprox_ds.micro_adam.kernels import window_passes

    adapprox: dict[str, Callable[[], None]] = {}
    for name in SMALL[1:]:
        adapprox[f"{name}_kernel idle"] = partial(
            check_seen, triton_small_kernels, f"{name}_kernel"
        )
    of = {"gram": triton_small_kernels, "pass": triton_pass}
    of |= {"run": triton_pass, "sum": triton_tables}
    for name, module in of.items():
        adapprox[f"{name}_kernel idle"] = partial(
            check_wrong, Adapprox, module, f"{name}_kernel", Idle(), "differ from torch's"
        )
        adapprox[f"{name}_kernel refused"] = partial(
            check_wrong, Adapprox, module, f"{name}_kernel", Refusing(), "TypeError: at 3:5: no"
        )
    for name in ("accumulate_kernel", "keep_kernel", "update_kernel"):
        adapprox[f"{name} idle"] = partial(
            check_wrong, MicroAdam, window_passes, name, Idle(), "differ from torch's"
        )
    adapprox["update_kernel refused"] = partial(
        check_wrong, MicroAdam, window_passes, "update_kernel", Refusing(), "no such type"
    )
    adapprox["long"] = check_long
    adapprox["forced"] = partial(check_forced, Adapprox, triton_pass, "pass_kernel")
    adapprox["forced windows"] = partial(check_forced, MicroAdam, window_passes, "update_kernel")
    return adapprox


RIGHT: dict[str, Callable[[], None]] = {
    "right": partial(check_right, Adapprox),
    "right, bf16": partial(check_right, Adapprox, first_moment="bf16"),
    "right, int8": partial(check_right, Adapprox, first_moment="int8"),
    "right windows": partial(check_right, MicroAdam),
    "right windows, alpha": partial(check_right, MicroAdam, alpha=0.25),
    "bound": check_bound,
}
#: The kernels of the small algebra.
SMALL = ("gram", "weight", "sketch", "row_product", "column_product", "solve", "factor")
BROKEN = (
    *(f"{x}_kernel idle" for x in (*SMALL, "pass", "run", "sum")),
    *(f"{x}_kernel refused" for x in (SMALL[0], "pass", "run", "sum")),
    *(f"{x}_kernel idle" for x in ("accumulate", "keep", "update")),
    *("update_kernel refused", "long", "forced", "forced windows"),
)
CHECKS = (*RIGHT, *BROKEN)


def main() -> None:
    torch.set_num_threads(1)
    interpreted.prepare()
    found = {}
    for name, run in (RIGHT | modules()).items():
        try:
            run()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
