# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's monitors hold after training with ``watch``. Run by test_monitor.py."""

from __future__ import annotations

import csv
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.adapprox.metrics import Metrics
from adapprox_ds.micro_adam.metrics import WindowMetrics
from adapprox_ds.report.monitor import layer_of, watch
from tests.models import trainable
from tests.zero.cases_stages import Z2, Z3, Case, adapprox_of, full_value, start, train

EVERY, STEPS = 2, 8
NAMES = ("mean_rank", "mean_error", "largest_error", "state_bytes")


def with_monitor(case: Case, folder: Path, kind: str = "csv_monitor") -> Case:
    """The case with a monitor that writes to ``folder``/run."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    return replace(case, extra={**case.extra, kind: monitor})


def series(path: Path) -> dict[int, float]:
    """The rows of a monitor's CSV file, each of its own x."""
    with path.open(newline="") as file:
        (_, *rows) = csv.reader(file)
    found = {int(x): float(y) for x, y in rows}
    assert len(found) == len(rows), path
    return found


def everywhere(engine: Any) -> list[Any]:
    """The metrics of every rank, read by the test itself."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, adapprox_of(engine).metrics())
    return parts


def expected(parts: list[Any]) -> dict[str, float]:
    """What a report of these metrics must say."""
    if isinstance(parts[0], WindowMetrics):
        return {
            "entries": sum(k for part in parts for k in part.entries.values()),
            "state_bytes": sum(part.state_bytes for part in parts),
        }
    return expected_of_factors(parts)


def expected_of_factors(parts: list[Metrics]) -> dict[str, float]:
    """The same of Adapprox's."""
    blocks = [item for part in parts for item in part.parameters.items()]
    errors = [block.error for _, block in blocks]
    layers = defaultdict(list)
    for name, block in blocks:
        layers[f"rank_{layer_of(name)}"].append(block.rank)
    return {
        "mean_rank": sum(block.rank for _, block in blocks) / len(blocks),
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
        "state_bytes": sum(part.state_bytes for part in parts),
        **{layer: sum(ranks) / len(ranks) for layer, ranks in layers.items()},
    }


def watched(case: Case, reports: tuple[int, ...], folder: Path, layers: bool = False) -> None:
    """Rows at the steps that are due and no others, equal to the metrics of all ranks then."""
    case = with_monitor(case, folder)
    engine, _ = start(case)
    optimizer = adapprox_of(engine)
    began = time.perf_counter()
    handle = watch(engine, every=EVERY, layers=layers)
    time.sleep(0.2)
    due: dict[int, dict[str, float]] = {}
    for step in range(STEPS):
        train(engine, case, step)
        values = expected(everywhere(engine))
        if step + 1 in reports:
            due[engine.global_samples] = values
    elapsed = time.perf_counter() - began
    handle.remove()
    for step in range(STEPS, STEPS + EVERY):
        train(engine, case, step)
    assert engine.global_steps == STEPS + EVERY
    if torch.distributed.get_rank() == 0:
        log, owner, factored = folder / "run", case.cls.__name__, case.cls is Adapprox
        names = set(NAMES) if factored and not layers else set(next(iter(due.values())))
        files = {path.stem.removeprefix(f"{owner}_") for path in log.glob(f"*{owner}_*.csv")}
        assert files == names | {"step_seconds"}
        for name in names:
            want = {x: values[name] for x, values in due.items()}
            assert series(log / f"{owner}_{name}.csv") == pytest.approx(want, rel=1e-12), name
        if factored:
            assert len({v["mean_rank"] for v in due.values()}) > 1, "no rank ever changed"
        assert due.keys() < series(log / "Train_Samples_lr.csv").keys()
        seconds = series(log / f"{owner}_step_seconds.csv")
        assert seconds.keys() == due.keys()
        waits = [s * n for s, n in zip(seconds.values(), lengths(reports), strict=True)]
        assert waits[0] >= 0.2
        assert sum(waits) <= elapsed
    assert optimizer.metrics().step >= STEPS
    engine.destroy()


def lengths(reports: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in zip((0, *reports), reports, strict=False)]


def unmanaged(folder: Path) -> None:
    """Where the script steps when it likes, samples are counted as DeepSpeed counts them."""
    extra = {"managed_gradient_accumulation": False}
    case = with_monitor(Case(Z2, accumulation=2, extra=extra), folder)
    engine, _ = start(case)
    watch(engine, every=1)
    for micro_batches in (1, 3, 2):
        for _ in range(micro_batches):
            engine.backward(engine(0, 1.0))
        engine.step()
    if torch.distributed.get_rank() == 0:
        world = torch.distributed.get_world_size()
        ranks = series(folder / "run" / "Adapprox_mean_rank.csv")
        assert list(ranks) == [world, 4 * world, 6 * world]
        assert ranks.keys() == series(folder / "run" / "Train_Samples_lr.csv").keys()
    engine.destroy()


def last_group(folder: Path) -> None:
    """ZeRO-2 steps group by group: what is reported is the state after the last one."""
    params = {"lr": 1e-3, "rank_init": 6, "rank_max": 6, "rank_beta": 0.0, "error_threshold": 1.0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adapprox", "params": params},
        "zero_optimization": Z2,
        **with_monitor(Case(), folder).extra,
    }
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    groups = [{"params": list(layer.parameters())} for layer in model]
    engine = adapprox_ds.initialize(model=model, model_parameters=groups, config=config)[0]
    watch(engine, every=1)
    due = {}
    for _ in range(3):
        engine.backward(engine(torch.randn(1, 32)).square().mean())
        engine.step()
        due[engine.global_samples] = expected(everywhere(engine))["mean_rank"]
    assert len(set(due.values())) == 3, "ranks must fall at every step"
    if torch.distributed.get_rank() == 0:
        assert series(folder / "run" / "Adapprox_mean_rank.csv") == due
    engine.destroy()


def no_influence(case: Case, folder: Path) -> None:
    """To the bit, a watched run is the run that was not watched."""
    states = []
    for every in (None, 1):
        engine, model = start(with_monitor(case, folder / str(every)))
        if every:
            watch(engine, every=every, layers=case.cls is Adapprox)
        for step in range(4):
            train(engine, case, step)
        parameters = trainable(model).values()
        keys = (None, "exp_avg", "exp_avg_sq")
        states.append([full_value(engine, p, key) for p in parameters for key in keys])
        engine.destroy()
    plain, seen = states
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def nothing_factored(folder: Path) -> None:
    """Vectors alone: bytes are written, means over nothing are not."""
    case = with_monitor(Case(), folder)
    model = torch.nn.LayerNorm(64)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adapprox", "params": {"lr": 1e-3}},
        **case.extra,
    }
    engine = adapprox_ds.initialize(model=model, config=config)[0]
    watch(engine, every=1)
    engine.backward(engine(torch.randn(1, 64)).square().sum())
    engine.step()
    assert math.isnan(adapprox_of(engine).metrics().mean_rank)
    if torch.distributed.get_rank() == 0:
        names = {path.stem for path in (folder / "run").glob("Adapprox_*")}
        assert names == {"Adapprox_state_bytes", "Adapprox_step_seconds"}
    engine.destroy()


def refused(folder: Path) -> None:
    """Bad values, ranks of windows, no monitor in the config, an optimizer that is not ours."""
    engine, _ = start(with_monitor(Case(Z2), folder))
    for every in (0, -1, 1.5, "10"):
        with pytest.raises(ValueError, match=rf"every={every!r} .* an integer >= 1"):
            watch(engine, every=every)  # type: ignore[arg-type]
    engine.destroy()
    engine, _ = start(with_monitor(Case(Z2, method="micro"), folder))
    with pytest.raises(ValueError, match=r"layers=True is not .* MicroAdam, .*allowed: False"):
        watch(engine, layers=True)
    engine.destroy()
    engine, _ = start(Case(Z2))
    with pytest.raises(ValueError, match=r'"csv_monitor".*"tensorboard", "wandb"'):
        watch(engine)
    engine.destroy()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        **with_monitor(Case(), folder).extra,
    }
    engine = deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
    with pytest.raises(RuntimeError, match="is AdamW, not Adapprox"):
        watch(engine)
    engine.destroy()


def tensorboard(folder: Path) -> None:
    """The same events in TensorBoard's file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = with_monitor(Case(Z2), folder, "tensorboard")
    engine, _ = start(case)
    watch(engine, every=1)
    train(engine, case, 0)
    values = expected(everywhere(engine))
    if torch.distributed.get_rank() == 0:
        events = EventAccumulator(str(folder / "run"))
        events.Reload()
        for name in NAMES:
            (event,) = events.Scalars(f"Adapprox/{name}")
            assert event.step == engine.global_samples
            assert event.value == pytest.approx(values[name], rel=1e-6)
    engine.destroy()


ALL = (2, 4, 6, 8)
CASES: dict[str, Callable[[Path], None]] = {
    "z0": partial(watched, Case(), ALL),
    "z0_bf16": partial(watched, Case(precision="bf16"), ALL),
    "bf16_optimizer": partial(watched, Case({"stage": 1}, "bf16_fp32acc"), ALL),
    "z1_accumulate": partial(watched, Case({"stage": 1}, accumulation=2), ALL),
    # Step 4 is skipped, and step 5 reports in its place.
    "z2_fp16_overflow": partial(watched, Case(Z2, "fp16", overflow_at=3), (2, 5, 6, 8)),
    "z3_sub_groups": partial(watched, Case({**Z3, "sub_group_size": 200}), ALL, layers=True),
    "z3_instance": partial(watched, Case(Z3, "bf16", "instance", accumulation=2), ALL),
    "micro_z0": partial(watched, Case(method="micro"), ALL),
    "micro_z2_fp16_overflow": partial(
        watched, Case(Z2, "fp16", overflow_at=3, method="micro"), (2, 5, 6, 8)
    ),
    "micro_z3_sub_groups": partial(
        watched, Case({**Z3, "sub_group_size": 200}, method="micro"), ALL
    ),
    "micro_no_influence": partial(no_influence, Case(Z2, method="micro")),
    "last_group": last_group,
    "unmanaged": unmanaged,
    "no_influence": partial(no_influence, Case({**Z3, "sub_group_size": 200})),
    "nothing_factored": nothing_factored,
    "refused": refused,
    "tensorboard": tensorboard,
}
