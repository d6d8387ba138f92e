# SPDX-License-Identifier: Apache-2.0
"""MatrixViews under every wrapper, against stock classes on the same row blocks in plain torch.

With the scope "matrix", against stock classes on the whole matrices. Run by test_matrix_views.py on
one to three ranks. What lies where comes from DeepSpeed's published rules of layout
(cases_stages.cuts), not from its tables or ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.optim import Adafactor, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import adapprox_ds
from adapprox_ds.checkpoint import CheckpointError, convert
from adapprox_ds.checkpoint.inspect import inspect
from adapprox_ds.core.layout import SCOPES
from adapprox_ds.zero import MatrixViews
from tests.adapprox.oracle import most_square
from tests.checkpoint.cases_resume import differences
from tests.models import SHAPES, KnownGradients, coefficient, start_value, trainable
from tests.zero.cases_stages import CPU, DECAY, Z2, Z3, Case, config_of, cuts, full_value, train

STEPS, HALF = 4, 2


class Counting(Optimizer):
    """Normalises rows and columns, and slows down by a count that it keeps in its groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                size = p.grad.abs().mean(0, keepdim=True) + p.grad.abs().mean(-1, keepdim=True)
                seen = self.state[p].setdefault("seen", torch.zeros_like(size))
                seen.add_(size)
                p.sub_(p.grad / (seen + 0.1), alpha=group["lr"] / group["calls"])


@dataclass
class Method:
    """Arguments of MatrixViews."""

    kind: type[Optimizer]
    args: dict[str, Any]
    vectors: type[Optimizer] | None = None
    vectors_args: dict[str, Any] | None = None

    def views(self, groups: Any, scope: str = "partition") -> MatrixViews:
        split: dict[str, Any] = {"vectors": self.vectors, "vectors_args": self.vectors_args}
        return MatrixViews(self.kind, groups, scope=scope, **split, **self.args)


def method(name: str) -> Method:
    """One of the optimizers that are tested."""
    if name == "came":
        from pytorch_optimizer import CAME

        return Method(CAME, {"lr": 1e-2, "weight_decay": 0.1})
    return {
        "adafactor": Method(Adafactor, {"lr": 5e-2, "weight_decay": 0.1}),
        "adafactor_twice": Method(
            Adafactor, {"lr": 5e-2, "weight_decay": 0.1}, Adafactor, {"lr": 5e-2}
        ),
        "counting": Method(Counting, {}),
        "muon": Method(
            Muon,
            {"lr": 2e-2, "weight_decay": 0.2},
            AdamW,
            {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        ),
    }[name]


@dataclass
class Run:
    """An optimizer in a setting.

    Attributes:
        method: one that :func:`method` knows.
        case: the setting.
        remake: DeepSpeed's storage is replaced between the steps.
        scope: of MatrixViews.
        apart: a matrix that is in a group with ``"vectors": True``.
    """

    method: str
    case: Case
    remake: bool = False
    scope: str = "partition"
    apart: str = ""


def instance(zero: dict[str, Any], precision: str = "fp32", **more: Any) -> Case:
    return Case(zero, precision, "instance", **more)


SUB_GROUPS = {**Z3, "sub_group_size": 200}
RUNS = {
    "z0_bf16_adafactor": Run("adafactor", instance({}, "bf16")),
    "bf16_optimizer_came": Run("came", instance({"stage": 1}, "bf16_fp32acc")),
    "z1_adafactor": Run("adafactor", instance({"stage": 1})),
    "z1_counting": Run("counting", instance({"stage": 1}, "bf16")),
    "z1_round_robin_remade_muon": Run(
        "muon", instance({"stage": 1, "round_robin_gradients": True}), remake=True
    ),
    "z2_came": Run("came", instance(Z2, "bf16")),
    "z2_offload_muon": Run("muon", instance({**Z2, **CPU}, "bf16")),
    "z2_fp16_overflow_adafactor": Run("adafactor", instance(Z2, "fp16", overflow_at=2)),
    "z3_adafactor": Run("adafactor", instance(Z3)),
    "z3_init_muon": Run("muon", instance(Z3, "bf16", zero_init=True)),
    "z3_sub_groups_counting": Run("counting", instance(SUB_GROUPS)),
    "z3_offload_came": Run("came", instance({**SUB_GROUPS, **CPU}, "bf16")),
}


def whole(name: str, case: Case, **more: Any) -> Run:
    return Run(name, case, scope="matrix", **more)


WHOLE = {
    "whole_z0_bf16_muon": whole("muon", instance({}, "bf16")),
    "whole_bf16_optimizer_adafactor": whole("adafactor", instance({"stage": 1}, "bf16_fp32acc")),
    "whole_z1_round_robin_remade_muon": whole(
        "muon", instance({"stage": 1, "round_robin_gradients": True}), remake=True
    ),
    "whole_z2_offload_muon": whole("muon", instance({**Z2, **CPU}, "bf16"), apart="emb"),
    "whole_z2_fp16_overflow_came": whole("came", instance(Z2, "fp16", overflow_at=2)),
    "whole_z3_init_muon": whole("muon", instance(Z3, "bf16", zero_init=True), apart="emb"),
    "whole_z3_sub_groups_counting": whole("counting", instance(SUB_GROUPS)),
    "whole_z3_offload_came": whole("came", instance({**SUB_GROUPS, **CPU}, "bf16")),
}
RUNS |= WHOLE
#: Those that do not run on two ranks.
RANKS = {
    "whole_z1_round_robin_remade_muon": 3,
    "whole_z3_init_muon": 3,
    "whole_z3_sub_groups_counting": 3,
    "whole_z3_offload_came": 1,
}
RESUMED = (
    "z0_bf16_adafactor",
    "bf16_optimizer_came",
    "z1_counting",
    "z2_offload_muon",
    "z3_init_muon",
    "z3_sub_groups_counting",
    "z3_offload_came",
    "whole_z2_offload_muon",
    "whole_z3_sub_groups_counting",
)


def rate(step: int) -> float:
    """The scheduler's factor."""
    return 1.0 / (1.0 + step)


def start(run: Run) -> tuple[Any, KnownGradients, MatrixViews]:
    """A model, its engine and the optimizer in it."""
    torch.manual_seed(0)
    config = config_of(run.case)
    if run.case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = KnownGradients()
        for name, cell in model.cells.items():
            with deepspeed.zero.GatheredParameters([cell.weight], modifier_rank=0):
                cell.weight.data.copy_(start_value(name).reshape(cell.weight.shape))
    else:
        model = KnownGradients()
        model.set_start_values()
    named = {name: cell.weight for name, cell in model.cells.items()}
    decay: dict[str, Any] = {"params": [(n, p) for n, p in named.items() if n in DECAY]}
    other: dict[str, Any] = {"params": [(n, p) for n, p in named.items() if n not in DECAY]}
    groups = [decay, {**other, "weight_decay": 0.0}]
    if run.apart:
        for group in groups:
            group["params"] = [pair for pair in group["params"] if pair[0] != run.apart]
        same = groups[run.apart not in DECAY]
        groups.append({**same, "params": [(run.apart, named[run.apart])], "vectors": True})
    optimizer = method(run.method).views(groups, run.scope)
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, lr_scheduler=LambdaLR(optimizer, rate)
    )[0]
    if run.scope == "matrix" and run.case.stage in (1, 2):
        adapprox_ds.attach(engine)
    return engine, model, optimizer


class Oracle:
    """The stock classes on leaf tensors of their own: whole rows, cut rows, vectors.

    Args:
        run: what is imitated.
        world: the number of ranks.
        uncut: whether parameters are whole.
    """

    def __init__(self, run: Run, world: int, uncut: bool = False) -> None:
        how = method(run.method)
        self.parts: dict[str, list[Tensor]] = {}
        self.bounds: dict[str, list[int]] = {}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for n, spans in cuts(run.case, world).items():
            self.bounds[n] = [0, spans[-1][1]] if uncut else list(breaks(SHAPES[n], spans))
            flat, self.parts[n] = start_value(n).reshape(-1), []
            for lo, hi in pairwise(self.bounds[n]):
                whole = most_square(SHAPES[n]) or (hi,)
                shape = whole if uncut else shape_of(SHAPES[n], lo, hi)
                part = torch.nn.Parameter(flat[lo:hi].clone().view(shape))
                self.parts[n].append(part)
                vector = how.vectors is not None and (len(shape) == 1 or n == run.apart)
                groups.setdefault((vector, n in DECAY), []).append(part)
        self.optimizers: list[tuple[Optimizer, float]] = []
        for (vector, decays), parts in groups.items():
            kind = how.vectors if vector else how.kind
            args = how.vectors_args if vector else how.args
            assert kind is not None
            assert args is not None
            group = {"params": parts, **({} if decays else {"weight_decay": 0.0})}
            self.optimizers.append((kind([group], **args), args.get("lr", 0.1)))

    def step(self, step: int, scheduled: int) -> None:
        for n, parts in self.parts.items():
            g = (coefficient(n, step) * (0.0 if n == "unused" else 1.0)).reshape(-1)
            for part, lo in zip(parts, self.bounds[n], strict=False):
                part.grad = g[lo : lo + part.numel()].clone().view(part.shape)
        for optimizer, lr in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr * rate(scheduled)
            optimizer.step()

    def whole(self, n: str) -> Tensor:
        return torch.cat([part.detach().reshape(-1) for part in self.parts[n]])


def breaks(shape: tuple[int, ...], spans: list[tuple[int, int]]) -> Iterator[int]:
    """Where pieces of a parameter begin: at the cuts, and at the whole rows between them."""
    view = most_square(shape)
    for lo, hi in spans:
        yield lo
        if view is not None:
            first, last = -(-lo // view[1]) * view[1], hi // view[1] * view[1]
            rows = (last - first) // view[1]
            if rows * view[1] > rows + view[1]:
                yield from (edge for edge in (first, last) if lo < edge < hi)
    yield spans[-1][1]


def shape_of(shape: tuple[int, ...], lo: int, hi: int) -> tuple[int, ...]:
    """(rows, columns) of a piece that is a matrix worth factoring, else its length."""
    view = most_square(shape)
    if view is None or lo % view[1] or hi % view[1]:
        return (hi - lo,)
    rows = (hi - lo) // view[1]
    return (rows, view[1]) if rows * view[1] > rows + view[1] else (hi - lo,)


def equals_oracle(name: str, folder: Path) -> None:
    """Every parameter after every step, to the bit."""
    run = RUNS[name]
    engine, model, _ = start(run)
    oracle = Oracle(run, torch.distributed.get_world_size(), run.scope == "matrix")
    shapes = {p.dim() for parts in oracle.parts.values() for p in parts}
    assert shapes == {1, 2}
    scheduled = 0
    for step in range(STEPS):
        if run.remake:
            for flat in engine.optimizer.single_partition_of_fp32_groups:
                flat.data = flat.data.clone()
        train(engine, run.case, step)
        if step != run.case.overflow_at:
            oracle.step(step, scheduled)
            scheduled += 1
        for n, p in trainable(model).items():
            actual = (p if run.case.misleads else full_value(engine, p, None)).detach().reshape(-1)
            expected = oracle.whole(n)
            assert torch.equal(actual, expected), f"step {step}, {n}"
    engine.destroy()


def depends_on_the_cut(folder: Path) -> None:
    """With the scope "partition" results are not those of whole matrices: a control of the rest."""
    run = RUNS["z3_adafactor"]
    engine, model, _ = start(run)
    oracle = Oracle(run, torch.distributed.get_world_size(), True)
    for step in range(2):
        train(engine, run.case, step)
        oracle.step(step, step)
    for n in ("w1", "emb"):
        actual = full_value(engine, trainable(model)[n], None).reshape(-1)
        assert not torch.allclose(actual, oracle.whole(n), rtol=1e-3), n
    engine.destroy()


def owners_share_the_state(folder: Path) -> None:
    """At stage 3 each matrix's state is on one rank, and ranks hold about as much."""
    run = RUNS["whole_z3_sub_groups_counting"]
    engine, _, optimizer = start(run)
    train(engine, run.case, 0)
    own = [span for held in optimizer.state.values() for span in held["spans"]]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, [math.prod(span[1:]) for span in own])
    expected = [math.prod(shape) for n, shape in SHAPES.items() if n not in ("frozen", "empty")]
    assert sorted(size for sizes in everyone for size in sizes) == sorted(expected)
    loads = [sum(sizes) for sizes in everyone]
    assert max(loads) - min(loads) <= max(expected), loads
    assert all(map(len, everyone)), everyone
    engine.destroy()


def snapshot(optimizer: MatrixViews, model: KnownGradients, engine: Any) -> dict[str, Any]:
    """All that this rank's training is made of; copied."""
    weights = {n: full_value(engine, p, None).clone() for n, p in trainable(model).items()}
    return {"weights": weights, "state": [copied(held) for held in optimizer.state.values()]}


def copied(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return [copied(value) for value in x] if isinstance(x, list) else x


def first_half(name: str, folder: Path) -> None:
    """Train unbroken for four steps; apart from that for two, and save."""
    engine, model, optimizer = start(RUNS[name])
    for step in range(2 * HALF):
        train(engine, RUNS[name].case, step)
    path = folder / f"reference{torch.distributed.get_rank()}.pt"
    torch.save(snapshot(optimizer, model, engine), path)
    engine.destroy()
    engine, model, optimizer = start(RUNS[name])
    for step in range(HALF):
        train(engine, RUNS[name].case, step)
    engine.save_checkpoint(str(folder / "checkpoint"))
    engine.destroy()


def second_half(name: str, folder: Path) -> None:
    """In a new process, whose weights have moved: load, train on, compare with the unbroken run."""
    rank, source = torch.distributed.get_rank(), folder.parent / f"first_{name}"
    engine, model, optimizer = start(RUNS[name])
    train(engine, RUNS[name].case, 7)
    assert engine.load_checkpoint(str(source / "checkpoint"))[0] is not None
    for step in range(HALF, 2 * HALF):
        train(engine, RUNS[name].case, step)
    reference = torch.load(source / f"reference{rank}.pt", weights_only=False)
    unequal = differences(reference, snapshot(optimizer, model, engine))
    assert not unequal, unequal
    engine.destroy()


@dataclass
class Move:
    """A run that is saved on two ranks and goes on elsewhere.

    Attributes:
        source: the run that is saved.
        target: the run that goes on.
        world: on how many ranks.
    """

    source: Run
    target: Run
    world: int


_BF16_MUON = whole("muon", instance({}, "bf16"), apart="emb")
MOVES = {
    "offload_to_sub_groups": Move(
        RUNS["whole_z2_offload_muon"],
        whole("muon", instance(SUB_GROUPS, "bf16"), apart="emb"),
        3,
    ),
    "z3_to_z0": Move(RUNS["whole_z3_init_muon"], _BF16_MUON, 1),
    "z3_counting_to_z1": Move(
        RUNS["whole_z3_sub_groups_counting"], whole("counting", instance({"stage": 1})), 3
    ),
    "bf16_optimizer_to_z3": Move(
        RUNS["whole_bf16_optimizer_adafactor"],
        whole("adafactor", instance(Z3, "bf16")),
        1,
    ),
}


def save_to_move(name: str, folder: Path) -> None:
    """Two steps; saved, looked at, and converted."""
    run = MOVES[name].source
    engine, _, _ = start(run)
    for step in range(HALF):
        train(engine, run.case, step)
    engine.save_checkpoint(str(folder), tag="saved")
    if torch.distributed.get_rank() == 0:
        convert(folder, folder / "universal", workers=1)
        for path in (folder / "saved", folder / "universal"):
            report = inspect(path)
            assert "MatrixViews of" in report.title, report.title
            assert sum(row.second_bytes for row in report.rows) > 0
        with pytest.raises(CheckpointError, match="second_moment='as-saved'"):
            convert(folder, folder / "dense", second_moment="dense", workers=1)
    torch.distributed.barrier()
    engine.destroy()


def go_on(name: str, folder: Path) -> None:
    """The rest of the run on other ranks, to the bit what one unbroken run in plain torch is."""
    run, source = MOVES[name].target, folder.parent / f"save_{name}"
    engine, model, _ = start(run)
    if MOVES[name].world > 1:  # else there is nothing yet of what is loaded
        train(engine, run.case, 7)
    adapprox_ds.load_universal(engine, source / "universal")
    oracle = Oracle(run, torch.distributed.get_world_size(), True)
    for step in range(HALF):
        oracle.step(step, step)
    for step in range(HALF, 2 * HALF):
        train(engine, run.case, step)
        oracle.step(step, step)
        for n, p in trainable(model).items():
            actual = full_value(engine, p, None).reshape(-1)
            assert torch.equal(actual, oracle.whole(n)), f"step {step}, {n}"
    # As any other state, it is saved.
    engine.save_checkpoint(str(folder / "again"))
    engine.destroy()


def refused_moves(folder: Path) -> None:
    """State that belongs to the partition, other classes, and parts that do not fit together."""
    for scope, kind, message in (
        ("partition", "muon", "scope='partition'.*train with scope='matrix'"),
        (
            "matrix",
            "adafactor_twice",
            "'row_var' for each part of 'cells.emb.weight'.*\"vectors\": True",
        ),
        ("matrix", "muon", None),
    ):
        run = whole(kind, instance(Z3), apart="emb")
        engine, _, _ = start(replace(run, scope=scope))
        train(engine, run.case, 0)
        where = folder / f"{scope}_{kind}"
        engine.save_checkpoint(str(where), tag="saved")
        if torch.distributed.get_rank() == 0:
            if message is None:
                convert(where, where / "universal", workers=1)
            else:
                with pytest.raises(CheckpointError, match=message):
                    convert(where, where / "universal", workers=1)
        torch.distributed.barrier()
        engine.destroy()
    for run, message in (
        (whole("adafactor_twice", instance(Z3), apart="emb"), "allowed here: Adafactor"),
        (Run("muon", instance(Z3), apart="emb"), "scope='partition' cannot load"),
    ):
        engine, _, _ = start(run)
        with pytest.raises(CheckpointError, match=message):
            adapprox_ds.load_universal(engine, folder / "matrix_muon" / "universal")
        engine.destroy()


def held_bytes(state: Any) -> int:
    """Bytes of the tensors in a nested state, step counters aside."""
    if isinstance(state, Tensor):
        return state.nbytes if state.dim() else 0
    if isinstance(state, dict):
        return sum(map(held_bytes, state.values()))
    return sum(map(held_bytes, state)) if isinstance(state, list | tuple) else 0


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(37, 50), torch.nn.Tanh(), torch.nn.Linear(50, 37))


def trained(engine: Any, steps: int) -> list[float]:
    """The losses of :func:`small_model` in some steps."""
    x = torch.randn(32, 37, generator=torch.Generator().manual_seed(engine.global_rank))
    losses = []
    for _ in range(steps):
        loss = (engine(x) - x.flip(1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def learns(name: str, zero: dict[str, Any], folder: Path) -> None:
    """The loss falls, and a rank's state is that of its rows; the stock class keeps a dense one."""
    how = method(name)
    config = config_of(Case(zero))
    del config["optimizer"]
    held = {}
    for wrapped in (True, False):
        model = small_model()
        shapes = [tuple(p.shape) for p in model.parameters()]
        build = how.views if wrapped else partial(how.kind, **how.args)
        optimizer = build(model.parameters())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        losses = trained(engine, 12 if wrapped else 1)
        assert not wrapped or losses[-1] < 0.7 * losses[0], losses
        held[wrapped] = held_bytes(list(optimizer.state.values()))
        engine.destroy()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    dense, factored = 0, 0
    begin, size = 0, math.ceil(sum(map(math.prod, shapes)) / (2 * world)) * 2
    for shape in shapes:
        n = math.prod(shape)
        if zero["stage"] == 3:
            lo, hi = min(rank * -(-n // world), n), min((rank + 1) * -(-n // world), n)
        else:
            lo, hi = (min(max(edge - begin, 0), n) for edge in (rank * size, rank * size + size))
        begin += n
        edges = list(breaks(shape, [(lo, hi)])) if lo < hi else []
        for a, b in pairwise(edges):
            dense += b - a
            factored += sum(shape_of(shape, a, b))
    # CAME: factors of the square and of the residual's square (vectors have no residual), and an
    # unfactored momentum.
    momentum = dense if name == "came" else 0
    copies = 2 if name == "came" else 1
    assert 4 * (momentum + factored) <= held[True] <= 4 * (momentum + copies * factored)
    assert factored < 0.2 * dense
    assert held[False] >= 4 * (momentum + dense), "the stock class on the flat shard saves nothing"


def galore(zero: dict[str, Any], folder: Path) -> None:
    """GaLore, which projects gradients on directions that it looks for in each matrix.

    It learns, resumes to the bit with its projections, and holds less than half of Adam's moments.
    """
    from pytorch_optimizer import GaLore

    def started() -> Any:
        model = small_model()
        optimizer = MatrixViews(
            GaLore, model.parameters(), lr=3e-2, rank=4, update_proj_gap=4, scale=1.0,
            projection_type="std",
        )  # fmt: skip
        config = config_of(Case(zero))
        del config["optimizer"]
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    engine = started()
    losses = trained(engine, 12)
    assert losses[-1] < 0.7 * losses[0], losses
    engine.save_checkpoint(str(folder / "galore"))
    after = trained(engine, 5)
    states = list(engine.basic_optimizer.state.values())
    held = held_bytes(states)
    shard = (2 * 37 * 50 + 87) // torch.distributed.get_world_size()
    assert held < 0.5 * 8 * shard, (held, shard)
    engine.destroy()
    engine = started()
    trained(engine, 1)
    engine.load_checkpoint(str(folder / "galore"))
    assert trained(engine, 5) == after
    engine.destroy()


def frozen_afterwards(folder: Path) -> None:
    """At stage 0 a parameter that is frozen later stays where it is, as under Adapprox."""
    run = RUNS["z0_bf16_adafactor"]
    engine, model, _ = start(run)
    weight = model.cells["w2"].weight
    weight.requires_grad_(False)
    for step in range(2):
        train(engine, run.case, step)
    assert torch.equal(weight.detach().float(), start_value("w2"))
    assert not torch.equal(model.cells["w1"].weight.detach().float(), start_value("w1"))
    engine.destroy()


def refused(folder: Path) -> None:
    """Another partition's state, Adam's state, and settings that lose or bypass the state."""
    rank = torch.distributed.get_rank()
    run = RUNS["z1_adafactor"]
    engine, _, optimizer = start(run)
    train(engine, run.case, 0)
    torch.save(optimizer.state_dict(), folder / f"state{rank}.pt")
    torch.distributed.barrier()
    optimizer.load_state_dict(torch.load(folder / f"state{1 - rank}.pt"))
    with pytest.raises(RuntimeError, match=r"pieces where this tensor has \d+, or they lie elsewh"):
        train(engine, run.case, 1)
    engine, _, optimizer = start(run)
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        optimizer.state[flat] = {"step": torch.ones(()), "exp_avg": torch.zeros_like(flat)}
    with pytest.raises(RuntimeError, match=r"holds \['exp_avg', 'step'\].*universal checkpoint"):
        train(engine, run.case, 0)
    refused_scopes()
    for zero, message in (
        ({**Z3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, 'device="nvme"'),
        ({**Z2, "elastic_checkpoint": True}, "elastic_checkpoint=true"),
    ):
        model = KnownGradients()
        with pytest.raises(ValueError, match=message):
            adapprox_ds.initialize(
                model=model,
                optimizer=MatrixViews(Adafactor, model.parameters()),
                config=config_of(instance(zero)),
            )


def refused_scopes() -> None:
    """A state of the other scope, and shards of which nobody says who holds the rest."""
    run = RUNS["whole_z3_sub_groups_counting"]
    for theirs, ours in (("matrix", "partition"), ("partition", "matrix")):
        engine, _, saved = start(replace(run, scope=theirs))
        train(engine, run.case, 0)
        other, _, optimizer = start(replace(run, scope=ours))
        for held, flat in zip(saved.state.values(), groups_flat(other), strict=True):
            optimizer.state[flat] = held
        with pytest.raises(RuntimeError, match=f"scope='{theirs}' and this .* scope='{ours}'"):
            train(other, run.case, 0)
    model = KnownGradients()
    model.set_start_values()
    optimizer = MatrixViews(Counting, model.parameters(), scope="matrix")
    config = config_of(instance({"stage": 1}))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    with pytest.raises(RuntimeError, match=r"needs the process group.*adapprox_ds\.initialize"):
        train(engine, instance({"stage": 1}), 0)


def groups_flat(engine: Any) -> list[Tensor]:
    """The shards of stage 3, in the order of the steps."""
    flats: list[Tensor] = engine.optimizer.fp32_partitioned_groups_flat
    return flats


def attached(folder: Path) -> None:
    """adapprox_ds.initialize reads the layout at once, and completes the config."""
    model = KnownGradients()
    model.set_start_values()
    config = config_of(instance({**Z2, **CPU}))
    del config["zero_allow_untested_optimizer"], config["zero_force_ds_cpu_optimizer"]
    engine = adapprox_ds.initialize(
        model=model, optimizer=partial(MatrixViews, Muon, vectors=AdamW), config=config
    )[0]
    assert engine.optimizer.optimizer.shards.attached
    scope = SCOPES[torch.distributed.get_rank()]
    with pytest.raises(RuntimeError, match="scope of group 0 is 'matrix' on rank 1"):
        adapprox_ds.initialize(
            model=KnownGradients(),
            optimizer=partial(MatrixViews, AdamW, scope=scope),
            config=config,
        )
    before = model.cells["w1"].weight.detach().clone()
    train(engine, instance(Z2), 0)
    assert not torch.equal(before, model.cells["w1"].weight)


CASES: dict[str, Callable[[Path], None]] = {
    **{f"equals_{name}": partial(equals_oracle, name) for name in RUNS},
    **{f"first_{name}": partial(first_half, name) for name in RESUMED},
    **{f"second_{name}": partial(second_half, name) for name in RESUMED},
    **{
        f"learns_z{stage}_{name}": partial(learns, name, {**Z3, "stage": stage})
        for stage in (1, 2, 3)
        for name in ("adafactor", "came")
    },
    "galore_z2": partial(galore, Z2),
    "galore_z3": partial(galore, Z3),
    "frozen_afterwards": frozen_afterwards,
    "depends_on_the_cut": depends_on_the_cut,
    "owners_share_the_state": owners_share_the_state,
    **{f"save_{name}": partial(save_to_move, name) for name in MOVES},
    **{f"move_{name}": partial(go_on, name) for name in MOVES},
    "refused_moves": refused_moves,
    "refused": refused,
    "attached": attached,
}
