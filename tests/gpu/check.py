# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in at most 8 minutes: ``make gpu-check``.

``python -m tests.gpu.check [--minutes 8] [--cpu] [--only PART...]`` needs torch and Triton, and no
DeepSpeed; where that is installed, ZeRO-2 and 3 run over NCCL in one process as well. Parts:

* kernels: every case of tests/adapprox/cases_kernels.py and larger ones, against one dense
  computation in fp64, in memory that holds NaN where nothing was written;
* self_check: the forms of the kernels' README as a user's first step checks them, with their time;
* waits: the operations of a step, its first three aside, for which the host waits for the device;
* bench: examples/paper/bench_step.py on the shapes of GPT-2 345M, and S-RSI;
* deepspeed: a few steps under ZeRO-2 and 3.

Prints tables and writes one JSON. Exits with 1 where a kernel is wrong or a step waits, and with 2
where there is no GPU. ``--cpu`` runs the same at small sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests import ROOT

RESULTS = ROOT / "examples" / "paper" / "results"
NO_DEVICE = 2
#: Of the bench: what bench_step.py calls them; those that are not installed are left out.
COMPARED = (
    *("AdamW, foreach", "Adafactor (torch)", "AdamW8bit", "FlashAdamW", "MicroAdam"),
    *(f"Adapprox, k = {k}" for k in (1, 8, 64)),
    *(f"Adapprox, k = 8, {kind} first moment" for kind in ("bf16", "int8")),
)

Found = dict[str, Any]


class Check:
    """One run.

    Args:
        device: "cuda", or "cpu" for Triton's interpreter and small sizes.
        deadline: on time.monotonic's clock, after which nothing more is begun.
    """

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self.deadline = device, deadline

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def facts(self) -> Found:
        """The machine and what is installed."""
        import torch
        import triton

        found: Found = {"torch": torch.__version__, "triton": triton.__version__}
        found |= {"python": platform.python_version(), "device": platform.machine()}
        if self.device == "cuda":
            of = torch.cuda.get_device_properties(0)
            found |= {"device": of.name, "memory_bytes": of.total_memory}
            found |= {"capability": f"{of.major}.{of.minor}", "cuda": torch.version.cuda}
        return found

    def kernels(self) -> Found:
        """Name of a case -> what went wrong, or nothing."""
        from adapprox_ds.adapprox.kernels import triton_pass
        from tests.adapprox import cases_kernels, cases_small
        from tests.adapprox.cases_kernels import BRAIN, CODES, HALF, Case

        small = {"one element", "cut rows", "codes of updates", "reads, bf16"}
        cases = {
            name: of
            for name, of in cases_kernels.INTERPRETED.items()
            if self.device == "cuda" or name in small
        }
        if self.device == "cuda":
            large = Case(1000, 3072, 8, 13, 16)
            cases |= {
                f"large {i}": [of]
                for i, of in enumerate(
                    (
                        large,
                        replace(
                            large, m=4096, n=1024, k=1, w=6, t=9, offset=0, gap=0, runs=(5000,)
                        ),
                        replace(large, m=5025, n=768, k=16, w=21, transposed=True, skip=700),
                        replace(large, m=2048, n=2048, b=3, k=64, w=69, t=72, dtype=BRAIN),
                        replace(large, m=768, n=768, b=40, offset=0, gap=32, of_gradients=False),
                        replace(large, b=1, k=123, w=128, t=133, moment=BRAIN, missing=5),
                        replace(large, m=999, moment=CODES, dtype=HALF, ascend=True, skip=4),
                        replace(large, moment=CODES, offset=0, gap=0),
                    )
                )
            }
        found = {}
        for name, of in cases.items():
            if self.late:
                found[name] = "not begun: no time was left"
                continue
            partials = cases_kernels.PARTIALS.get(name, triton_pass._PARTIALS)
            long = 1 if name in cases_kernels.LONG else triton_pass._LARGEST
            share = triton_pass._SHARE if name not in cases_kernels.PARTIALS else 1 << 40
            with mock.patch.multiple(triton_pass, _PARTIALS=partials, _SHARE=share, _LARGEST=long):
                found[name] = said(
                    cases_kernels.check, triton_pass, *(replace(c, device=self.device) for c in of)
                )
        large_stacks = [cases_small.Case(24, 4096, 1024, 8, 13, 18)] * (self.device == "cuda")
        found["small algebra"] = said(
            cases_small.check_every_case, "triton", self.device, large_stacks
        )
        return found

    def self_check(self) -> Found:
        """Form -> seconds of its first check, the compiler's included, and the verdict."""
        import torch

        from adapprox_ds.adapprox.kernels import forms
        from tests.gpu import static

        device = torch.device(self.device)
        cpu = self.device == "cpu"
        example = {"_ROWS": 20, "_COLS": (37,), "_RUN": 200} if cpu else {}
        found: Found = {}
        with mock.patch.multiple(forms, **example):
            for form in (*static.MAIN, static.SMALL[0]) if cpu else static.SHOWN:
                if self.late:
                    break
                began = time.monotonic()
                verdict = form.check(device)
                found[form.words] = {"seconds": time.monotonic() - began, "verdict": verdict}
        return found

    def waits(self) -> Found:
        """By optimizer, the operations for which a step waits; None where no device says so."""
        import torch

        from adapprox_ds import Adapprox, MicroAdam

        found: Found = {}
        shapes = ((70, 90), (9,)) if self.device == "cpu" else ((1024, 3072), (3072, 1024), (1024,))
        built: dict[str, Callable[[Any], Any]] = {
            "Adapprox": Adapprox,
            "Adapprox, int8, clipped": lambda p: Adapprox(
                p, first_moment="int8", clip_threshold=1.0
            ),
            "MicroAdam, propagates": lambda p: MicroAdam(p, nonfinite="propagate"),
        }
        for name, build in built.items():
            params = [torch.nn.Parameter(torch.randn(x, device=self.device)) for x in shapes]
            optimizer = build(params)
            for step in range(5):
                for p in params:
                    p.grad = torch.randn_like(p)
                if step < 3 or self.device == "cpu":
                    optimizer.step()
                    continue
                torch.cuda.synchronize()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        optimizer.step()
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                found[name] = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
            found.setdefault(name, None)
        return found

    def bench(self) -> Found:
        """Times as ratios to fused AdamW, bytes of state, transient bytes, S-RSI."""
        sys.path.insert(0, str(ROOT / "examples" / "paper"))
        try:
            bench_step = importlib.import_module("bench_step")
        finally:
            sys.path.pop(0)
        cpu = self.device == "cpu"
        shapes = [(64, 96), (96,), (96, 64)] if cpu else bench_step.shapes_of("345m", 24)
        names = [x for x in COMPARED if not cpu or x in ("AdamW, foreach", "Adapprox, k = 8")]
        found: Found = {"parameters": 0, "optimizers": {}}
        # In pairs with fused AdamW, so that all states fit the device one after the other.
        for name in names:
            table = bench_step.optimizers([name])
            if self.late or name not in table:
                found["optimizers"].setdefault(name, None)
                continue
            parameters = bench_step.make_parameters(shapes, self.device)
            found["parameters"] = sum(p.numel() for p in parameters)
            rows = bench_step.bench(parameters, table, 2 if cpu else 10, self.device, None)
            found["optimizers"][name] = rows[name]
            found["optimizers"].setdefault("AdamW, fused", rows["AdamW, fused"])
            del parameters
        sizes = [64] if cpu else [1024, 2048, 4096]
        if not self.late:
            found["srsi"] = bench_step.bench_srsi(sizes, 1 if cpu else 5, self.device)
        return found

    def deepspeed(self) -> Found:
        """Losses of a few steps by stage; empty where DeepSpeed is not installed, or too late."""
        if importlib.util.find_spec("deepspeed") is None or self.late:
            return {}
        import torch

        import adapprox_ds

        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"})
        found: Found = {}
        for stage in (2, 3):
            torch.manual_seed(0)
            net = torch.nn.Sequential(
                torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64)
            )
            config = {
                "train_micro_batch_size_per_gpu": 8,
                "bf16": {"enabled": self.device == "cuda"},
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": "Adapprox", "params": {"lr": 1e-3, "rank_max": 8}},
            }
            engine = adapprox_ds.initialize(
                model=net, model_parameters=list(net.parameters()), config=config
            )[0]
            kind = torch.bfloat16 if self.device == "cuda" else torch.float32
            losses = []
            for _ in range(5):
                x = torch.ones(8, 64, device=engine.device, dtype=kind)
                loss = engine(x).float().square().mean()
                engine.backward(loss)
                engine.step()
                losses.append(float(loss))
            optimizer = adapprox_ds.attach(engine)
            found[f"ZeRO-{stage}"] = {"losses": losses, "kernels": optimizer.metrics().kernels}
            assert losses[-1] < losses[0], losses
        return found


def said(work: Callable[..., Any], *given: Any) -> str:
    """What went wrong, or nothing."""
    try:
        work(*given)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {str(error).strip()[:500]}"
    return ""


PARTS = ("kernels", "self_check", "waits", "bench", "deepspeed")


def failures(found: Found) -> list[str]:
    """In words, what a run has found wrong."""
    wrong = [f"{part}: {found[part]['error']}" for part in PARTS if "error" in found.get(part, {})]
    kernels, forms, waits = (found.get(part, {}) for part in PARTS[:3])
    wrong += [f"kernels, {name}: {text}" for name, text in kernels.items() if text]
    verdicts = {name: of["verdict"] for name, of in forms.items() if isinstance(of, dict)}
    wrong += [f"self-check, {name}: {text}" for name, text in verdicts.items() if text]
    wrong += [f"{name} waits: {text}" for name, texts in waits.items() for text in texts or ()]
    return list(dict.fromkeys(wrong))


def tables(found: Found) -> str:
    """What is to be read of it."""
    lines = [", ".join(f"{key} {value}" for key, value in found["facts"].items()), ""]
    if forms := {k: v for k, v in found.get("self_check", {}).items() if isinstance(v, dict)}:
        lines += ["| form of a kernel | first check, s | verdict |", "|---|---|---|"]
        for name, of in forms.items():
            lines.append(f"| {name} | {of['seconds']:.2f} | {of['verdict'] or 'right'} |")
        lines.append("")
    bench = found.get("bench", {})
    if rows := {k: v for k, v in bench.get("optimizers", {}).items() if v}:
        lines += ["| optimizer | step, ms | / fused AdamW | state, bytes a parameter | peak, MB |"]
        lines += ["|---|---|---|---|---|"]
        for name, r in rows.items():
            state = r["state_bytes"] / bench["parameters"]
            peak = "" if r["transient_bytes"] is None else f"{r['transient_bytes'] / 2**20:.0f}"
            times = f"{1e3 * r['seconds']:.2f} | {r['ratio']:.2f}"
            lines.append(f"| {name} | {times} | {state:.2f} | {peak} |")
        lines.append("")
    for r in bench.get("srsi", ()):
        lines.append(f"S-RSI {r['n']} x {r['n']}, k = {r['k']}: {r['seconds']:.2e} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--cpu", action="store_true", help="small, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--results", type=Path, help="the JSON to write")
    options = parser.parse_args(arguments)
    if options.cpu:
        # Before Triton is imported, which chooses then.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print(
            f"no GPU is here: torch {torch.__version__} sees no CUDA or ROCm device, so nothing "
            "was checked. make gpu-check ARGS=--cpu runs the same at small sizes in Triton's "
            "interpreter"
        )
        return NO_DEVICE
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, whose kernels are to be checked: pip install triton")
        return NO_DEVICE
    device = "cpu" if options.cpu else "cuda"
    if options.cpu:
        from tests import interpreted

        interpreted.prepare()
    check = Check(device, time.monotonic() + 60 * options.minutes)
    found: Found = {"facts": check.facts()}
    for part in options.only:
        began = time.monotonic()
        try:
            found[part] = getattr(check, part)()
        except Exception:
            found[part] = {"error": traceback.format_exc()}
        found["facts"][f"{part}_seconds"] = round(time.monotonic() - began, 1)
    print(tables(found))
    path = options.results
    if path is None:
        words = "".join(x if x.isalnum() else "_" for x in found["facts"]["device"])
        path = RESULTS / f"gpu_check_{words.lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    wrong = failures(found)
    print("\n".join(wrong) or "all that was checked is right", f"({path})")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
