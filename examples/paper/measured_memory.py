# SPDX-License-Identifier: Apache-2.0
"""Memory of optimizers in training, measured: state, extra during a step, and peak of the process.

    python examples/paper/measured_memory.py [--model gpt2-124m] [--steps 3] [--only NAME...]

Trains GPT-2 in fp32, or in bf16 where the row says "bf16 weights", forward and backward of real
layers on random tokens (batch 1, length 64), with each optimizer in a fresh process, one after
another. Of each is measured:

- run: bytes of weights, gradients and state together, over the number of parameters.
- state: bytes of the storages that the state's tensors, or the tensors inside compact ones, hold,
  each storage once; step counters aside. Beside it stands what adapprox_ds.report.estimate says
  before anything is allocated, as `python -m adapprox_ds estimate --stage 0 --world 1` prints it.
- step: the most memory that a step takes beyond what is held before or after it, whichever is more;
  the largest of all steps but the first, which makes the state. On a CPU this is resident memory,
  the kernel's own high-water mark (VmHWM), set back through /proc/self/clear_refs before the step;
  workers tell malloc to return freed blocks of 64 KiB or more, so that a step cannot hide in what
  backward left behind. On CUDA it is torch.cuda.max_memory_allocated.
- peak: the same high-water mark over the whole run, with weights, gradients and activations; on a
  CPU with torch, its imports and what torch.compile needs for AdamW8bit as well.

Prints a Markdown table, writes results/measured_memory.json (with the model's or the device's name
in it where they are not the default), and exits with an error where state and estimate differ by
more than 0.1 %. CAME, GaLore, AdamW8bit, AdamW4bit and Adam-mini take part where
pytorch_optimizer, torchao and adam-mini are installed. GaLore's decomposition, in the first step,
is in the peak alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from bench_step import fixed, is_narrow, optimizers
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from adapprox_ds import Adapprox
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.report.estimate import estimate
from adapprox_ds.report.model_shapes import MODELS as ESTIMATED_MODELS
from adapprox_ds.report.model_shapes import load_shapes

MODELS: Mapping[str, GPT2Config] = {
    "gpt2-124m": GPT2Config(),
    "gpt2-345m": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "tiny": GPT2Config(vocab_size=16384, n_embd=256, n_layer=2, n_head=4, n_positions=64),
}
DEFAULT_MODEL = "gpt2-124m"
LENGTH = 64
#: Percent by which state and estimate may differ.
TOLERANCE = 0.1

#: What the estimator calls each optimizer: Adapprox's rank and first moment, or a peer's name; None
#: for one that it does not know.
ESTIMATED_AS: Mapping[str, tuple[int, str] | str | None] = {
    "AdamW, fused": "AdamW",
    "AdamW, fused, bf16 weights": "AdamW",
    "Adapprox, k = 8": (8, "fp32"),
    "Adapprox, k = 8, bf16 first moment": (8, "bf16"),
    "Adapprox, k = 8, int8 first moment": (8, "int8"),
    "Adapprox, k = 8, int4 first moment": (8, "int4"),
    "Adapprox, k = 8, bf16 weights, fp32 first moment": (8, "fp32"),
    "Adapprox, k = 8, bf16 weights, int8 first moment": (8, "int8"),
    "Adapprox, k = 8, bf16 weights, int4 first moment": (8, "int4"),
    "Adapprox, k = 8, bf16 weights compensated, int8 first moment": (8, "int8"),
    "Adapprox, k = 8, bf16 weights compensated, int4 first moment": (8, "int4"),
    "Adapprox, k = 1, no first moment": (1, "none"),
    "Adapprox, paper, k = 8": (8, "fp32"),
    "Adafactor (torch)": "Adafactor",
    "CAME": None,
    "AdamW8bit": "AdamW8bit",
    "AdamW4bit": None,
    "NAdamW": "AdamW",
    "Muon": None,
    "Adam-mini": None,
    "GaLore": None,
    "Lion": None,
}

#: Workers' malloc maps larger blocks one by one, and so returns each to the system when freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}


class Meter(Protocol):
    """Bytes of memory in use."""

    def held(self) -> int:
        """Now."""

    def peak(self) -> int:
        """The most since the last ``reset``, or since the process began."""

    def reset(self) -> None:
        """Begin a new peak."""


class ProcessMeter:
    """Resident memory of this process, from Linux."""

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(key))

    def held(self) -> int:
        return self._status("VmRSS:")

    def peak(self) -> int:
        return self._status("VmHWM:")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")


class CudaMeter:
    """Memory of the device that torch has given out."""

    def held(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def extra_bytes(meter: Meter, work: Callable[[], Any]) -> int:
    """The most that a call takes beyond what is held before or after it, whichever is more."""
    gc.collect()  # what is garbage already must not go in the middle of the call
    before = meter.held()
    meter.reset()
    work()
    return meter.peak() - max(before, meter.held())


def held_tensors(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors that an entry of an optimizer's state consists of."""
    if isinstance(value, CompactTensor):
        yield from (t for t in tree_leaves(value.store.to_payload()) if isinstance(t, Tensor))
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from held_tensors(getattr(value, name))
    elif hasattr(value, "ortho_matrix"):  # GaLore's, an object of its own
        yield value.ortho_matrix
    elif isinstance(value, Tensor) and value.dim():
        yield value


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all storages under the state's tensors, step counters aside."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    storages = [t.untyped_storage() for value in values for t in held_tensors(value)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def builders() -> dict[str, Callable[[list], torch.optim.Optimizer]]:
    """Name -> what makes it, of those that are installed; says which are not."""
    ours: dict[str, Callable[[list], torch.optim.Optimizer]] = {
        "Adapprox, k = 8, bf16 first moment": lambda p: Adapprox(
            p, 1e-4, **fixed(8, first_moment="bf16")
        ),
        "Adapprox, k = 1, no first moment": lambda p: Adapprox(
            p, 1e-4, betas=(0.0, 0.999), **fixed(1)
        ),
        "Adapprox, k = 8, bf16 weights, fp32 first moment": lambda p: Adapprox(p, 1e-4, **fixed(8)),
    }
    return optimizers(None) | ours


def estimated_bytes(model: str, name: str) -> int | None:
    """What the estimator says of an optimizer's state; None where it does not know it."""
    known = ESTIMATED_AS[name]
    if known is None:
        return None
    if model in ESTIMATED_MODELS:
        shapes = load_shapes(model)
    else:
        with torch.device("meta"):
            built = GPT2LMHeadModel(MODELS[model])
        shapes = {key: tuple(p.shape) for key, p in built.named_parameters()}
    masters = "compensated" if "compensated" in name else "bf16" if is_narrow(name) else "fp32"
    run: dict[str, Any] = {"stage": 0, "world": 1, "masters": masters}
    run["dtype"] = "fp32" if masters == "fp32" else "bf16"
    if isinstance(known, str):
        peers = estimate(shapes, **run).peers
        return next(peer.largest for peer in peers if peer.name == known)
    rank, kind = known
    held = estimate(shapes, ranks=[rank], first_moment=kind, **run)
    return held.adapprox[rank].largest


def train(model_name: str, name: str, steps: int) -> dict[str, int]:
    """One optimizer's run in this process, measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter: Meter = CudaMeter() if device == "cuda" else ProcessMeter()
    torch.manual_seed(0)
    config = MODELS[model_name]
    kind = torch.bfloat16 if is_narrow(name) else torch.float32
    model = GPT2LMHeadModel(config).to(device, kind)
    optimizer = builders()[name](list(model.parameters()))
    extra, peak = [], 0
    for step in range(steps):
        tokens = torch.randint(config.vocab_size, (1, LENGTH), device=device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        peak = max(peak, meter.peak())
        extra.append(extra_bytes(meter, optimizer.step))
        peak = max(peak, meter.peak())
        if step == 0:
            run = sum(p.nbytes + p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "run_bytes": run + state_bytes(optimizer),
        "state_bytes": state_bytes(optimizer),
        "step_bytes": max(extra[1:]),
        "peak_bytes": peak,
    }


def measure(model: str, name: str, steps: int) -> dict[str, Any]:
    """One optimizer's row, from a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--steps", str(steps), "--worker", name]
    done = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: its process failed with exit code {done.returncode}")
    row = json.loads(done.stdout.splitlines()[-1])
    expected = estimated_bytes(model, name)
    gap = None if expected is None else 100 * (row["state_bytes"] - expected) / expected
    return row | {"estimated_bytes": expected, "difference_percent": gap}


def disagreements(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The optimizers whose state is not what was estimated."""
    gaps = {name: row["difference_percent"] for name, row in rows.items()}
    return [
        f"{name}: state and estimate differ by {gap:+.3f} %; allowed: {TOLERANCE} %"
        for name, gap in gaps.items()
        if gap is not None and abs(gap) > TOLERANCE
    ]


def result_name(model: str, device: str) -> str:
    """The file's, of which README.md shows the default one."""
    parts = [model] * (model != DEFAULT_MODEL) + [device] * (device != "cpu")
    return "_".join(["measured_memory", *parts]) + ".json"


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of the bytes a parameter: weights and gradients, and state."""
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(rows))
    state = [rows[n]["state_bytes"] / rows[n]["parameters"] for n in names]
    run = [rows[n]["run_bytes"] / rows[n]["parameters"] for n in names]
    rest = [a - b for a, b in zip(run, state, strict=True)]
    axes.barh(names, rest, color="0.7", label="weights and gradients")
    axes.barh(names, state, left=rest, color="C0", label="optimizer state")
    for i, total in enumerate(run):
        axes.text(total + 0.1, i, f"{total:.1f}", va="center", fontsize=8)
    axes.set(xlabel="bytes a parameter", xlim=(0, 18))
    axes.tick_params(axis="y", labelsize=8)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=3, help="at least 2; the first is not counted")
    parser.add_argument("--only", nargs="+", choices=ESTIMATED_AS, default=list(ESTIMATED_AS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", choices=ESTIMATED_AS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps {options.steps} is not allowed; allowed: at least 2")
    if options.worker:
        print(json.dumps(train(options.model, options.worker, options.steps)))
        return
    installed = builders()
    names = [name for name in options.only if name in installed]
    rows = {}
    heads = ("optimizer", "run, bytes a parameter", "state", "estimated", "difference", "step")
    heads = (*heads, "peak")
    print("In MB (2^20 bytes):\n\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name in names:
        row = rows[name] = measure(options.model, name, options.steps)
        sizes = ("state_bytes", "estimated_bytes", "step_bytes", "peak_bytes")
        cells = ["-" if row[key] is None else f"{row[key] / 2**20:.2f}" for key in sizes]
        gap = row["difference_percent"]
        cells.insert(2, "-" if gap is None else f"{gap:+.3f} %")
        cells.insert(0, f"{row['run_bytes'] / row['parameters']:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "model": options.model,
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / result_name(options.model, device)
    path.write_text(json.dumps({**facts, "optimizers": rows}, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))
    if wrong := disagreements(rows):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
