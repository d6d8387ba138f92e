# SPDX-License-Identifier: Apache-2.0
"""Two ranks agree on Triton's kernels; run as a program, in Triton's interpreter."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.adapprox import small
from adapprox_ds.adapprox.kernels import forms
from adapprox_ds.core.kernels import backends, self_check
from tests import interpreted
from tests.core.cases_self_check import Idle, Refusing

WORLD = 2
#: By rank: of the second the only matrix is MicroAdam's, that is, a row.
SHAPES = {"alike": [((40, 50), (9,))] * WORLD, "one has none": [((40, 50), (9,)), ((9,),)]}
#: Small, for the interpreter.
EXAMPLE = {"_ROWS": 20, "_COLS": (37,), "_RUN": 200}


def train(kind: Any, shapes: Any, steps: int = 2, **settings: Any) -> tuple[Tensor, Any, list[str]]:
    """Some steps where Triton is the choice: weights, metrics and warnings of this rank."""
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(x, generator=random)) for x in shapes]
    optimizer = kind(params, lr=1e-2, **settings)
    optimizer.shards.process_group = distributed.group.WORLD
    self_check._verdicts.clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    self_check._log.addHandler(handler)
    try:
        for step in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            optimizer.step()
            if step == 0:
                known = dict(self_check._verdicts)
        assert known == self_check._verdicts, "a later step asked for more"
    finally:
        self_check._log.removeHandler(handler)
    return torch.cat([p.detach().flatten() for p in params]), optimizer.metrics(), said


def as_torch(kind: Any, shapes: Any, **settings: Any) -> Tensor:
    with mock.patch.dict(os.environ, {backends.VARIABLE: "torch"}):
        return train(kind, shapes, **settings)[0]


def check_right(shapes: Any, rank: int) -> None:
    _, metrics, said = train(Adapprox, shapes[rank])
    assert metrics.kernels and set(metrics.kernels.values()) == {"triton"}, metrics.kernels
    assert not said, said


def check_broken(
    kind: Any, name: str, broken: Any, on: int, words: str, shapes: Any, rank: int
) -> None:
    """A kernel fails on one rank: its forms are torch's on both, and others are not."""
    from adapprox_ds.adapprox.kernels import triton_pass
    from adapprox_ds.micro_adam.kernels import window_passes

    module = window_passes if kind is MicroAdam else triton_pass
    with ExitStack() as stack:
        if rank == on:
            stack.enter_context(mock.patch.object(module, name, broken))
        end, metrics, said = train(kind, shapes[rank])
    known = metrics.kernels
    of = {"pass_kernel": "matrices", "run_kernel": "runs"}.get(name, "")
    failed = {form: why for form, why in known.items() if why != "triton"}
    assert set(failed) == {form for form in known if of in form}, known
    where = "torch: " if rank == on else f"torch: on rank {on}: "
    assert all(why.startswith(where) and words in why for why in failed.values()), failed
    assert len(said) == len(failed), said
    if kind is MicroAdam:
        torch.testing.assert_close(end, as_torch(kind, shapes[rank]), rtol=1e-5, atol=1e-5)
    told: list[Any] = [None] * WORLD
    distributed.all_gather_object(told, sorted(failed))
    assert len({tuple(x) for x in told if x}) == 1, told


def check_missing(rank: int) -> None:
    """A rank cannot run Triton at all: torch is every rank's."""
    shapes = SHAPES["alike"][rank]
    choice = "triton" if rank == 0 else "torch"
    with mock.patch.object(backends, "automatic", lambda device, library: choice):
        end, metrics, _ = train(Adapprox, shapes)
    found = set(metrics.kernels.values())
    assert found == ({"torch: on rank 1: torch is taken, of auto"} if rank == 0 else set()), found
    assert torch.equal(end, as_torch(Adapprox, shapes))


def check_ranks_change(rank: int) -> None:
    """Where ranks of matrices grow over slices, the first step has checked what comes."""
    settings = {"rank_beta": 0.0, "rank_init": 15, "rank_max": 18, "error_threshold": 1e-9}
    _, metrics, said = train(Adapprox, ((70, 60),), 4, **settings)
    assert not said and set(metrics.kernels.values()) == {"triton"}, said
    ((found,),) = [metrics.parameters.values()]
    assert found.rank >= 17


def check_unknown(rank: int) -> None:
    """What ranks did not agree on is not checked by one of them alone."""
    with mock.patch.object(self_check, "_verdicts", {}), self_check.closed(True):
        assert not self_check.is_right(("cpu", "new"), lambda: None)
        assert "without it" in self_check.verdicts()["cpu new"]


REFUSED = "TypeError: at 3:5: no such type"
DIFFERS = "differ from torch's"
CASES: dict[str, Callable[[int], None]] = {
    "right": partial(check_right, SHAPES["alike"]),
    "missing": check_missing,
    "ranks change": check_ranks_change,
    "unknown": check_unknown,
    **{
        f"{name} {on} {shapes}": partial(
            check_broken, Adapprox, f"{name}_kernel", broken, on, words, SHAPES[shapes]
        )
        for name, broken, on, words, shapes in (
            ("pass", Idle(), 1, DIFFERS, "alike"),
            ("pass", Refusing(), 0, REFUSED, "one has none"),
            ("run", Idle(), 1, DIFFERS, "one has none"),
        )
    },
    "update 1": partial(
        check_broken, MicroAdam, "update_kernel", Refusing(), 1, REFUSED, SHAPES["alike"]
    ),
}


def run_rank(rank: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(port, WORLD), rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = {}
    for name, case in CASES.items():
        try:
            with (
                mock.patch.multiple(forms, **EXAMPLE),
                mock.patch.object(small, "_EXAMPLE", (1, 60, 50)),
                mock.patch.object(backends, "automatic", lambda device, library: "triton"),
            ):
                case(rank)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main() -> None:
    interpreted.prepare()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = multiprocessing.get_context("fork")
        ranks = [
            started.Process(target=run_rank, args=(rank, store, Path(folder)))
            for rank in range(WORLD)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        files = [Path(folder) / f"{rank}.json" for rank in range(WORLD)]
        if not all(file.exists() for file in files):
            sys.exit("a rank ended early")
        reports = [json.loads(file.read_text()) for file in files]
    print(json.dumps({name: "".join(report[name] for report in reports) for name in CASES}))


if __name__ == "__main__":
    main()
