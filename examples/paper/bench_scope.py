# SPDX-License-Identifier: Apache-2.0
"""Time of a step with scope="matrix" as a ratio to one with scope="partition", on several ranks.

    python examples/paper/bench_scope.py [--ranks 2] [--model 124m] [--layers 12] [--repeats 15]

Processes on this machine's CPU, joined by gloo, each with a shard of the model's shapes cut as ZeRO
cuts them. The scopes take turns; a step's time is that of the slowest rank, and every ratio is
within a round; medians with the smallest and largest. Writes results/bench_scope_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import MODELS, fixed, make_parameters, shapes_of
from torch import Tensor, distributed, multiprocessing

from adapprox_ds import Adapprox
from adapprox_ds.core.layout import ParamFragment, ShardLayout
from adapprox_ds.core.peers import find_peers
from adapprox_ds.report.state_bytes import flat_lengths, fragments_of

SCOPES: dict[str, dict[str, str]] = {
    "partition": {"scope": "partition"},
    "matrix, U sharded": {"scope": "matrix", "right_factor": "sharded"},
    "matrix, U replicated": {"scope": "matrix", "right_factor": "replicated"},
}
STAGES = (2, 3)
RESULT = Path(__file__).parent / "results" / "bench_scope_cpu.json"


def shard(shapes: list[tuple[int, ...]], stage: int, rank: int, world: int) -> tuple[Any, Any]:
    """This rank's flat tensor with its gradient, and the layout."""
    whole = [p.grad.flatten() for p in make_parameters(shapes, "cpu")]
    (size,) = flat_lengths(shapes, stage, world)
    flat = torch.nn.Parameter(torch.randn(size) * 0.02)
    flat.grad = torch.zeros(size)
    fragments, offset = [], 0
    for i, shape in enumerate(shapes):
        # Stage 3 cuts every parameter, the others all of them end to end.
        found = list(fragments_of([shape] if stage == 3 else shapes, stage, world))
        parts = found if stage == 3 else _of_parameter(found, i)
        for holder, _, _, start, numel in parts:
            if holder == rank:
                flat.grad[offset : offset + numel] = whole[i][start : start + numel]
                fragments.append(ParamFragment(f"p{i}", shape, start, numel, offset))
                offset += numel
    return flat, ShardLayout.build(fragments, size)


def _of_parameter(found: list[tuple[Any, ...]], i: int) -> list[tuple[Any, ...]]:
    """The parts of one parameter; each parameter's first one begins at 0."""
    begins = [j for j, part in enumerate(found) if part[3] == 0] + [len(found)]
    return found[begins[i] : begins[i + 1]]


def build(
    flat: torch.nn.Parameter, layout: ShardLayout, knobs: dict[str, str], group: Any
) -> Adapprox:
    """An optimizer of the shard, told what DeepSpeed's tables would tell it."""
    optimizer = Adapprox([("flat", flat)], **fixed(8), **knobs)
    h = optimizer.shards.settings[0]
    optimizer.shards.layouts[flat] = layout.with_scope(h.scope, h.shards_u)
    if h.scope == "matrix":
        fragments = [part.fragment for part in layout.fragments]
        optimizer.shards.peers[flat] = find_peers(fragments, group)
    return optimizer


def slowest(optimizer: Adapprox) -> float:
    """Seconds of a step, begun together, on the slowest rank."""
    distributed.barrier()
    begin = time.perf_counter()
    optimizer.step()
    taken: Tensor = torch.tensor(time.perf_counter() - begin)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def run(rank: int, world: int, options: argparse.Namespace, result: Any) -> None:
    """One rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    timeout = timedelta(seconds=300)
    distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    rows: dict[str, Any] = {}
    for stage in STAGES:
        flat, layout = shard(shapes_of(options.model, options.layers), stage, rank, world)
        built = {n: build(flat, layout, k, distributed.group.WORLD) for n, k in SCOPES.items()}
        for optimizer in built.values():
            slowest(optimizer)
        rounds = [{n: slowest(o) for n, o in built.items()} for _ in range(options.repeats)]
        for name, optimizer in built.items():
            ratios = sorted(r[name] / r["partition"] for r in rounds)
            rows[f"ZeRO-{stage}, {name}"] = {
                "seconds": median(r[name] for r in rounds),
                "ratio": median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
                "second_bytes": optimizer.state[flat]["exp_avg_sq"].allocated_bytes,
            }
    if rank == 0:
        result.update(rows)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--layers", type=int, default=12, help="of the model's layers")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--port", type=int, default=29611)
    options = parser.parse_args()
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        multiprocessing.spawn(run, (options.ranks, options, shared), nprocs=options.ranks)
        rows = dict(shared)
    for name, row in rows.items():
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        print(f"{name}: {row['ratio']:.2f} ({spread}), {1000 * row['seconds']:.0f} ms")
    facts = {"ranks": options.ranks, "model": options.model, "layers": options.layers}
    RESULT.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
