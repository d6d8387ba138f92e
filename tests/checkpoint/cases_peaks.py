# SPDX-License-Identifier: Apache-2.0
"""How much memory converting and loading take. Run by test_universal.py."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adapprox_ds
from adapprox_ds.checkpoint import convert, load_universal

LAYERS, SIDE = 24, 512

#: Of <malloc.h>; setting it also stops the C library from adapting it.
M_MMAP_THRESHOLD = -3


class Deep(nn.Module):
    """Much larger than its largest parameter."""

    def __init__(self, layers: int = LAYERS, side: int = SIDE) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def peak_mib(work: Callable[[], Any]) -> float:
    """The most anonymous memory that a call takes beyond what there was, in MiB."""

    def resident() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1])
        raise AssertionError("no RssAnon")

    # Freed blocks go back to the system at once: what a process keeps for later is chance.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    gc.collect()
    base, done, peak = resident(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
        # Where the machine is busy the thread may not have seen what is there now.
        peak[0] = max(peak[0], resident())
    finally:
        done.set()
        watcher.join()
    return (peak[0] - base) / 1024


def memory(stage: int, folder: Path) -> None:
    """Converting takes some of the largest parameter, loading no dense second moment."""
    params = {"lr": 1e-3, "rank_init": 4, "rank_max": 4, "power_iterations": 1}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Adapprox", "params": params},
    }

    def fresh(**more: Any) -> Any:
        model = Deep()
        parameters = list(model.parameters())
        made = adapprox_ds.initialize(
            model=model, model_parameters=parameters, config={**config, **more}
        )[0]
        made.backward(made(torch.ones(1, SIDE)))
        made.step()
        return made

    engine = fresh()
    engine.save_checkpoint(str(folder), tag="s")
    largest, model = SIDE * SIDE * 4 / 2**20, LAYERS * SIDE * SIDE * 4 / 2**20
    converting = peak_mib(lambda: convert(folder / "s", folder / "s_universal", workers=1))
    loading = peak_mib(lambda: load_universal(engine, folder))
    engine.destroy()
    engine = fresh(checkpoint={"load_universal": True})
    stock = peak_mib(lambda: engine.load_checkpoint(str(folder)))
    engine.destroy()
    print(f"MiB: model {model}, converting {converting}, loading {loading}, stock {stock}")
    assert converting < 6 * largest < model / 3
    # Weights and first moment as they were are kept until all ranks are done.
    assert loading < 2 * model + 6 * largest
    assert stock > model, "the measure does not see a dense second moment"


def matrix(folder: Path) -> None:
    """Matrices on two ranks: factors, and dense ones of Adam, take none as a whole."""
    layers, side = 3, 2048
    params = {"lr": 1e-3, "rank_init": 4, "rank_max": 4, "scope": "matrix"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adapprox", "params": params},
    }
    model = Deep(layers, side)
    parameters = list(model.parameters())
    engine = adapprox_ds.initialize(model=model, model_parameters=parameters, config=config)[0]
    engine.backward(engine(torch.ones(1, side)))
    engine.step()
    engine.save_checkpoint(str(folder), tag="s")
    if torch.distributed.get_rank() == 0:
        convert(folder / "s", folder / "as-saved", workers=1)
        convert(folder / "s", folder / "dense", workers=1, second_moment="dense")
    torch.distributed.barrier()
    largest, share = side * side * 4 / 2**20, layers * side * side * 4 / 2**20 / 2
    for source in ("as-saved", "dense"):
        loading = peak_mib(lambda source=source: load_universal(engine, folder / source))
        print(f"MiB: share {share}, largest {largest}, loading {source} {loading}")
        assert loading < 2 * share + 0.8 * largest, (source, loading)
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    "memory_z1": partial(memory, 1),
    "memory_z3": partial(memory, 3),
    "memory_matrix": partial(matrix),
}
