# SPDX-License-Identifier: Apache-2.0
"""Time of a step as a ratio to fused AdamW, bytes of state, transient bytes; S-RSI alone.

    python examples/paper/bench_step.py [--model 124m|345m] [--layers N] [--repeats 5] [--world N]

One process, one run: optimizers take turns, and every ratio is within a round; medians with the
smallest and largest. On a CPU the default is two of the model's layers and as much of its
embedding, on a GPU the whole model. With ``--world``, everything lies in one flat tensor: the shard
that the second of so many ZeRO ranks holds. CAME and 8-bit AdamW take part where pytorch_optimizer
and torchao are installed (pip install --no-deps), and on a CPU DeepSpeed's own Adam. "One pass"
is bare_pass.cpp: what reading, updating and sketching every matrix once costs there, with nothing
around it. Writes results/bench_step_<device>_<model>.json, with ``_shard`` in its name where there
is one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import PEERS, installed
from torch import Tensor

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.adapprox.srsi import error_ratio, srsi
from adapprox_ds.core.layout import ParamFragment, ShardLayout

#: (layers, width, positions); GPT-2's vocabulary is 50257.
MODELS = {"124m": (12, 768, 1024), "345m": (24, 1024, 1024)}
RANKS = (1, 4, 8, 16, 64, 256)
#: Of peers.py; those that need whole matrices take no part with --world. SOAP's first step here,
#: the eigenvectors of a matrix of 8,000 rows, takes minutes. GaLore's time is of the 49 steps in 50
#: that decompose no gradient.
TIMED_PEERS = ("NAdamW", "Muon", "Adam-mini", "GaLore", "Lion")


def shapes_of(model: str, layers: int) -> list[tuple[int, ...]]:
    """The parameters of ``layers`` of the model's layers and that part of its embeddings."""
    total, d, positions = MODELS[model]
    layer: list[tuple[int, ...]] = [
        (d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,),
        (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,),
    ]  # fmt: skip
    rows = [50257 * layers // total, positions * layers // total]
    return [(rows[0], d), (rows[1], d), *(layer * layers), (d,), (d,)]


def make_parameters(shapes: list[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    """Weights and gradients whose scale varies over rows and columns, as real ones do."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    parameters = []
    for shape in shapes:
        p = torch.nn.Parameter(normal(shape) * 0.02)
        rows = normal((shape[0], *[1] * (len(shape) - 1))).exp()
        p.grad = normal(shape) * rows * 1e-3
        parameters.append(p)
    return parameters


def make_shard(shapes: list[tuple[int, ...]], world: int, device: str) -> tuple[list, ShardLayout]:
    """The second of ``world`` equal parts of all parameters end to end, as ZeRO cuts them."""
    whole = torch.cat([p.grad.flatten() for p in make_parameters(shapes, device)])
    size = len(whole) // world
    begin, end, fragments, at = size, 2 * size, [], 0
    for i, shape in enumerate(shapes):
        numel = math.prod(shape)
        lo, hi = max(at, begin), min(at + numel, end)
        if lo < hi:
            fragments.append(ParamFragment(f"p{i}", shape, lo - at, hi - lo, lo - begin))
        at += numel
    flat = torch.nn.Parameter(torch.randn(size, device=device) * 0.02)
    flat.grad = whole[begin:end].clone()
    return [flat], ShardLayout.build(fragments, size)


def fixed(rank: int, **knobs: Any) -> dict[str, Any]:
    """Knobs that keep every matrix at one rank."""
    return {"rank_min": rank, "rank_init": rank, "rank_max": rank, **knobs}


def as_gpt2(parameters: list) -> list[tuple[str, Tensor]]:
    """Parameters with the names that GPT-2's first two have, its embeddings."""
    return [(("wte", "wpe")[i] if i < 2 else f"p{i}", p) for i, p in enumerate(parameters)]


def optimizers(names: list[str] | None) -> dict[str, Callable[[list], torch.optim.Optimizer]]:
    """Name -> builder; those of packages that are not installed are left out, and said so."""
    lr = 1e-4
    table: dict[str, Callable[[list], torch.optim.Optimizer]] = {
        "AdamW, fused": lambda p: torch.optim.AdamW(p, lr, fused=True),
        "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr, foreach=True),
        "Adafactor (torch)": lambda p: torch.optim.Adafactor(p, lr),
        "MicroAdam": lambda p: MicroAdam(p, lr),
        "Adapprox, paper, k = 8": lambda p: Adapprox(p, lr, **fixed(8, preset="paper")),
        # On copies of the parameters and gradients in bf16.
        "AdamW, fused, bf16 weights": lambda p: torch.optim.AdamW(p, lr, fused=True),
        "MicroAdam, bf16 weights": lambda p: MicroAdam(p, lr),
        "Adapprox, k = 8, bf16 first moment": lambda p: Adapprox(
            p, lr, **fixed(8, first_moment="bf16")
        ),
    }
    for kind in ("int8", "int4"):
        small = fixed(8, first_moment=kind)
        compensated = fixed(8, first_moment=kind, weight_rounding="compensated")
        table |= {
            f"Adapprox, k = 8, {kind} first moment": lambda p, x=small: Adapprox(p, lr, **x),
            f"Adapprox, k = 8, bf16 weights, {kind} first moment": lambda p, x=small: Adapprox(
                p, lr, **x
            ),
            f"Adapprox, k = 8, bf16 weights compensated, {kind} first moment": (
                lambda p, x=compensated: Adapprox(p, lr, **x)
            ),
        }
    for k in RANKS:
        table[f"Adapprox, k = {k}"] = lambda p, k=k: Adapprox(p, lr, **fixed(k))
    if not torch.cuda.is_available():
        for k in (1, 8):
            table[f"One pass, k = {k}"] = lambda p, k=k: BarePass(p, k)  # type: ignore[return-value]
    for name in installed(names or TIMED_PEERS):
        if name in TIMED_PEERS:
            table[name] = lambda p, build=PEERS[name]: build(as_gpt2(p), lr)
    for name, module, attribute in (
        ("CAME", "pytorch_optimizer", "CAME"),
        ("AdamW8bit", "torchao.optim", "AdamW8bit"),
        ("AdamW4bit", "torchao.optim", "AdamW4bit"),
        ("FlashAdamW", "flashoptim", "FlashAdamW"),
        ("DeepSpeedCPUAdam", "deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    ):
        try:
            build = getattr(import_module(module), attribute)
        except ImportError:
            if names is not None and name not in names:
                continue
            print(f"{name}: not measured, {module.partition('.')[0]} is not installed")
            continue
        table[name] = lambda p, build=build: build(p, lr=lr)
    if names is None:
        return table
    return {name: table[name] for name in ["AdamW, fused", *names] if name in table}


class BarePass:
    """One pass over all matrices at rank ``k``, with a sketch of 16 and a test sketch of k + 10."""

    state: dict = {}  # noqa: RUF012

    def __init__(self, parameters: list, k: int) -> None:
        folder = Path(tempfile.mkdtemp())
        source, built = Path(__file__).with_name("bare_pass.cpp"), folder / "bare_pass.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        flags += ["-fno-math-errno", "-fno-trapping-math"]
        subprocess.run(["c++", *flags, str(source), "-o", str(built)], check=True)
        # Even: bare_pass.cpp takes two columns of the test sketch at a time.
        self.call, self.k, self.width = ctypes.CDLL(str(built)).bare_pass, k, k + 10 + k % 2
        self.operands = [
            self._operands(len(p) // 8 * 8, p.shape[1], p)
            for p in parameters
            if p.dim() == 2 and p.shape[1] % 32 == 0
        ]

    def _operands(self, rows: int, cols: int, p: Tensor) -> tuple:
        k, width = self.k, self.width
        chunks = 4 * torch.get_num_threads()
        reads = [torch.rand(rows, k), torch.rand(k, cols) * 1e-3, torch.randn(cols, 16)]
        reads += [torch.randn(rows, width), torch.rand(rows) * 1e-3, torch.rand(cols)]
        writes = [torch.empty(rows, 16), torch.empty(chunks, width, cols)]
        writes += [torch.empty(rows), torch.empty(chunks, cols)]
        held = [p.grad, torch.zeros(rows, cols), p.detach().clone(), *reads, *writes]
        return rows, cols, held

    def step(self) -> None:
        for rows, cols, held in self.operands:
            self.call(
                *(ctypes.c_int64(n) for n in (rows, cols, self.k, self.width)),
                *(ctypes.c_void_p(x.data_ptr()) for x in held),
                ctypes.c_int(torch.get_num_threads()),
            )


def narrowed(parameters: list) -> list:
    """Copies of parameters and gradients in bf16."""
    copies = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters]
    for copy, p in zip(copies, parameters, strict=True):
        copy.grad = p.grad.bfloat16()
    return copies


def is_narrow(name: str) -> bool:
    """Whether an optimizer of that name gets weights in bf16."""
    return "bf16 weights" in name


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's queue included."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors."""
    if isinstance(optimizer, Adapprox):
        return optimizer.metrics(synchronize=True).state_bytes
    if isinstance(optimizer, MicroAdam):
        return optimizer.metrics().state_bytes

    def size(value: Any) -> int:
        names = getattr(value, "tensor_attrs", ("ortho_matrix",))
        inner = [getattr(value, name) for name in names if hasattr(value, name)]
        if inner:
            return sum(t.nbytes for t in inner)
        return value.nbytes if isinstance(value, Tensor) and value.dim() else 0

    return sum(size(v) for state in optimizer.state.values() for v in state.values())


def bench(
    parameters: list, table: dict, repeats: int, device: str, layout: ShardLayout | None
) -> dict[str, Any]:
    """Rounds in which every optimizer steps once."""
    narrow = narrowed(parameters)
    built = {
        name: build(narrow if is_narrow(name) else parameters) for name, build in table.items()
    }
    gradients = [p.grad for p in parameters]
    kept = [g.clone() for g in gradients]
    if layout is not None:
        for optimizer in built.values():
            if isinstance(optimizer, Adapprox | MicroAdam):
                optimizer.shards.layouts[optimizer.param_groups[0]["params"][0]] = layout
    transient = {}
    for name, optimizer in built.items():
        optimizer.step()
        torch._foreach_copy_(gradients, kept)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            torch.cuda.synchronize()
            transient[name] = torch.cuda.max_memory_allocated() - before
        else:
            optimizer.step()
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        rounds.append({})
        for name, optimizer in built.items():
            # MicroAdam's step leaves zeros.
            torch._foreach_copy_(gradients, kept)
            rounds[-1][name] = seconds(optimizer.step, device)
    rows = {}
    for name, optimizer in built.items():
        ratios = sorted(r[name] / r["AdamW, fused"] for r in rounds)
        rows[name] = {
            "seconds": median(r[name] for r in rounds),
            "ratio": median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
            "state_bytes": state_bytes(optimizer),
            "transient_bytes": transient.get(name),
        }
    return rows


def bench_srsi(sizes: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    """The paper's Table 1: literal S-RSI of one square matrix, l = p = 5."""
    rows = []
    for n in sizes:
        generator = torch.Generator(device).manual_seed(0)
        factors = [torch.rand(n, 64, generator=generator, device=device) for _ in range(2)]
        a = factors[0] @ factors[1].T
        for k in (8, 64, 256):
            sketch = torch.randn(n, k + 5, generator=generator, device=device)
            q, u = srsi(a, k, sketch, 5)
            work = partial(srsi, a, k, sketch, 5)
            times = [seconds(work, device) for _ in range(repeats)]
            rows.append(
                {"n": n, "k": k, "seconds": median(times), "error": float(error_ratio(a, q, u))}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--layers", type=int, help="of the model's layers; 0 for all")
    parser.add_argument("--world", type=int, help="of the ZeRO shard, at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="optimizers to compare with fused AdamW")
    parser.add_argument("--sizes", type=int, nargs="*", help="of the S-RSI matrices")
    options = parser.parse_args()
    every = MODELS[options.model][0]
    layers = options.layers if options.layers is not None else (2 if device == "cpu" else every)
    shapes = shapes_of(options.model, layers or every)
    layout = None
    if options.world is None:
        parameters = make_parameters(shapes, device)
    else:
        parameters, layout = make_shard(shapes, options.world, device)
    count = sum(p.numel() for p in parameters)
    print(f"{device}, {torch.get_num_threads()} threads, {count / 1e6:.1f} M parameters")
    table = optimizers(options.only)
    if layout is not None:
        # These take whole matrices.
        left_out = [*TIMED_PEERS, *(name for name in table if name.startswith("One pass"))]
        table = {name: build for name, build in table.items() if name not in left_out}
    rows = bench(parameters, table, options.repeats, device, layout)
    print("| optimizer | time / fused AdamW | spread | state, bytes a parameter |")
    print("|---|---|---|---|")
    for name, r in rows.items():
        spread = f"{r['ratio_min']:.2f} to {r['ratio_max']:.2f}"
        print(f"| {name} | {r['ratio']:.2f} | {spread} | {r['state_bytes'] / count:.2f} |")
    default_sizes = [1024] if device == "cpu" else [1024, 2048, 4096, 8192]
    sizes = default_sizes if options.sizes is None else options.sizes
    table1 = bench_srsi(sizes, options.repeats, device)
    for r in table1:
        size = f"{r['n']} x {r['n']}, k = {r['k']}"
        print(f"S-RSI {size}: {r['seconds']:.2e} s, error {r['error']:.2e}")
    name = f"bench_step_{device}_{options.model}{'_shard' if options.world else ''}.json"
    result = Path(__file__).parent / "results" / name
    result.parent.mkdir(exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": count,
        "world": options.world,
    }
    result.write_text(json.dumps({**facts, "optimizers": rows, "srsi": table1}, indent=1) + "\n")


if __name__ == "__main__":
    main()
