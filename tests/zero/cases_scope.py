# SPDX-License-Identifier: Apache-2.0
"""scope="matrix": a small GPT-2 by number of ranks, bytes, faults. Run by test_scope.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, distributed
from transformers import GPT2Config, GPT2LMHeadModel

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.adapprox import collectives
from adapprox_ds.adapprox.row_exchange import RowExchange, RowPlan
from adapprox_ds.checkpoint import convert, files, load_universal
from adapprox_ds.core.peers import CutParameter, Peers
from adapprox_ds.report.estimate import estimate
from tests.faults.cases_nonfinite import BLIND
from tests.zero.cases_stages import CPU, Z2, Z3, Case, run

#: Steps of a trajectory; fewer where time counts.
STEPS = 100 if os.environ.get("ADAPPROX_GRID") == "full" else 30
BATCH, LENGTH, VOCABULARY = 12, 16, 61
#: A parameter that three ranks share.
WHOLE = "transformer.h.0.mlp.c_fc.weight"
#: Every wrapper, against the naive oracle on whole matrices.
WRAPPERS = {
    "z0": Case(method="matrix"),
    "bf16_optimizer": Case({"stage": 1}, "bf16_fp32acc", method="replicated"),
    "z1": Case({"stage": 1}, method="matrix"),
    "z2_clipped": Case(Z2, "bf16", method="matrix_clipped"),
    "z2_offload": Case({**Z2, **CPU}, "bf16", method="matrix"),
    "z2_round_robin": Case({**Z2, "round_robin_gradients": True}, method="replicated"),
    "z3": Case(Z3, method="matrix"),
    "z3_instance": Case(Z3, "bf16", "instance", method="matrix"),
    "z3_sub_groups": Case({**Z3, "sub_group_size": 200}, "bf16", method="matrix_clipped"),
    "z3_init": Case(Z3, "bf16", zero_init=True, method="replicated"),
    "z3_init_sub_groups": Case({**Z3, "sub_group_size": 200}, zero_init=True, method="matrix"),
}
#: Where ranks keep rows of U, and where they keep all of it.
SHARDED = {"scope": "matrix"}
REPLICATED = {"scope": "matrix", "right_factor": "replicated"}
KNOBS = {"lr": 2e-3, "rank_max": 4, "weight_decay": 0.1, "eps": 1e-6}


def model() -> GPT2LMHeadModel:
    """Shapes that no number of ranks up to 4 divides by whole rows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=30, n_layer=2, n_head=3, n_positions=LENGTH + 1,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def batches(steps: int) -> list[Tensor]:
    """Counting in strides: learnable, and different at every step."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(steps):
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 5, (BATCH, 1), generator=generator)
        made.append((first + stride * torch.arange(LENGTH)) % VOCABULARY)
    return made


def rate(step: int) -> float:
    """Warm-up over ten steps."""
    return KNOBS["lr"] * min(1.0, (step + 1) / 10)


def reference(steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of plain torch on full matrices."""
    net = model()
    optimizer = Adapprox(list(net.named_parameters()), **KNOBS)
    losses = []
    for step, batch in enumerate(batches(steps)):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss = net(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in net.named_parameters()}


def start(stage: int, zero: dict[str, Any] | None = None, **knobs: Any) -> Any:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // distributed.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0,
            "stage": stage,
            **(zero or {}),
        },
        "optimizer": {"type": "Adapprox", "params": {**KNOBS, **knobs}},
    }
    net = model()
    return adapprox_ds.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Mean losses over the ranks."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    losses = []
    for step, batch in list(enumerate(batches(first + steps)))[first:]:
        engine.optimizer.param_groups[0]["lr"] = rate(step)
        mine = batch[rank * BATCH // world : (rank + 1) * BATCH // world]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """Whole fp32 weights."""
    return {
        n: safe_get_full_fp32_param(p).detach().clone() for n, p in engine.module.named_parameters()
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all weights, relative."""
    total = sum(float(w.square().sum()) for w in theirs.values())
    gaps = (float((ours[n].view_as(w) - w).square().sum()) for n, w in theirs.items())
    return (sum(gaps) / total) ** 0.5


def shares(engine: Any) -> list[Any]:
    """This rank's blocks of cut matrices."""
    states = engine.optimizer.optimizer.state.values()
    blocks = [b for state in states for b in state["exp_avg_sq"].store.factors]
    return [b for b in blocks if b.block.matrix_rows is not None]


def trajectory(stage: int, steps: int, knobs: dict[str, Any], folder: Path) -> None:
    """Training ends where plain torch on full matrices ends; per partition it does not."""
    losses, expected = reference(steps)
    engine = start(stage, **knobs)
    own = train(engine, steps)
    # Whether seen from any rank: bit for bit.
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, weights(engine))
    assert all(distance(w, everyone[0]) == 0.0 for w in everyone[1:])
    assert max(abs(a - b) for a, b in zip(own, losses, strict=True)) < 1e-4
    assert distance(everyone[0], expected) < 2e-5, distance(everyone[0], expected)
    engine.destroy()
    if distributed.get_world_size() > 1:
        engine = start(stage)
        train(engine, steps)
        assert distance(weights(engine), expected) > 1e-3
        engine.destroy()


def moves(stage: int, knobs: dict[str, Any], folder: Path) -> None:
    """10 steps, a universal checkpoint, another stage and 10 more are 20 steps without a break."""
    _, expected = reference(20)
    engine = start(stage, **knobs)
    train(engine, 10)
    parts = [b.block.u_rows for b in shares(engine)]
    assert parts and all((part is None) == (knobs is REPLICATED) for part in parts)
    engine.save_checkpoint(str(folder), tag="s")
    engine.destroy()
    if distributed.get_rank() == 0:
        convert(folder / "s", folder / "s_universal", workers=1)
        moment = files.read(folder / "s_universal" / "zero" / WHOLE / "exp_avg_sq.pt")["param"]
        (block,) = moment.store.factors
        place = block.block
        assert (place.offset, place.rows * place.cols) == (0, moment.numel())
        assert block.u.shape == (place.cols, block.q.shape[1])
    distributed.barrier()
    for to, other in ((1, REPLICATED), (2, SHARDED), (3, SHARDED)):
        engine = start(to, **other)
        load_universal(engine, folder)
        train(engine, 10, first=10)
        assert distance(weights(engine), expected) < 2e-5
        engine.destroy()


def resumes(stage: int, folder: Path, **knobs: Any) -> None:
    """DeepSpeed's own checkpoint, at the same topology: to the bit."""
    engine = start(stage, **knobs)
    train(engine, 6)
    engine.save_checkpoint(str(folder), tag="s")
    train(engine, 4, first=6)
    unbroken = weights(engine)
    engine.destroy()
    engine = start(stage, **knobs)
    engine.load_checkpoint(str(folder), tag="s")
    train(engine, 4, first=6)
    assert distance(weights(engine), unbroken) == 0.0
    engine.destroy()
    engine = start(stage)
    with pytest.raises(RuntimeError, match="scope|codes of another partition"):
        engine.load_checkpoint(str(folder), tag="s")
        train(engine, 1)
    engine.destroy()


def other_factors(
    stage: int, knobs: dict[str, Any], change: Callable[[Any], None], folder: Path
) -> None:
    """A rank whose U, or its rank where U is in parts, was changed is found out by all."""
    engine = start(stage, **knobs)
    with mock.patch.object(collectives, "_CHECK_EVERY", 2):
        train(engine, 2)
        if distributed.get_rank() == 1:
            change(shares(engine)[0])
        with pytest.raises(RuntimeError, match="factors of .* differ before step 3"):
            train(engine, 1)
    engine.destroy()


def bytes_held(stage: int, folder: Path) -> None:
    """State bytes of this rank are those of the estimate, where U is."""
    for scope, right_factor in (("matrix", "sharded"), ("matrix", "replicated")):
        knobs = {"scope": scope, "right_factor": right_factor, "first_moment": "int8"}
        engine = start(stage, rank_min=4, **knobs)
        train(engine, 1)
        named = engine.module.named_parameters()
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named}
        world, rank = distributed.get_world_size(), distributed.get_rank()
        expected = estimate(shapes, stage=stage, world=world, ranks=[4], **knobs).adapprox[4]
        assert engine.optimizer.optimizer.metrics().state_bytes == expected.state[rank]
        engine.destroy()


def unreadable(stage: int, folder: Path) -> None:
    """A second moment of which a rank has rows of U says so, where DeepSpeed reads it."""
    engine = start(stage, **SHARDED)
    train(engine, 2)
    p = dict(engine.module.named_parameters())[WHOLE]
    assert safe_get_full_optimizer_state(p, "exp_avg").norm() > 0
    with pytest.raises(RuntimeError, match="rows .* of the 120 .* right_factor='replicated'"):
        safe_get_full_optimizer_state(p, "exp_avg_sq")
    engine.destroy()


def other_u(block: Any) -> None:
    block.u[0, 0] += 1.0


def other_rank(block: Any) -> None:
    block.rank = 2.0


def leaves_out(stage: int, folder: Path) -> None:
    """A step whose gradients are NaN on one rank changes nothing anywhere; training goes on."""
    engine = start(stage, BLIND, **SHARDED, nonfinite="skip")
    train(engine, 2)
    before = weights(engine)
    batch = batches(1)[0][:2]
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss * (float("nan") if distributed.get_rank() == 1 else 1.0))
    engine.step()
    assert engine.optimizer.optimizer.skipped == 1
    assert distance(weights(engine), before) == 0.0
    train(engine, 2, first=2)
    assert 0.0 < distance(weights(engine), before) < 1.0
    engine.destroy()


def exchange_rows(folder: Path) -> None:
    """Rows go to everyone and sums to their owners, in pieces and where whole tables are summed."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    m, n, width = 6, 11, 4
    forms = {
        True: [((0, 23), (23, 40), (40, 66)), ((0, 22), (22, 44), (44, 66))],
        False: [((0, 62), (62, 64), (64, 66)), ((0, 5), (5, 8), (8, 66))],
    }
    for in_pieces, cuts in forms.items():
        parameters = [
            CutParameter(f"p{i}", (m, n), spans, (0, 1, 2)) for i, spans in enumerate(cuts)
        ]
        peers = Peers(distributed.group.WORLD, world, {})
        like = torch.zeros(0)
        plan = RowPlan(parameters, [width] * 2, peers, like.device)
        assert plan.pieces is in_pieces
        whole = [torch.arange(n * width).view(n, width) + 100.0 * i for i in range(2)]
        own = [slice(*p.parts_of_u[rank]) for p in parameters]
        exchange = RowExchange(plan, like)
        exchange.gather({i: table[own[i], :3] for i, table in enumerate(whole)})
        for i, table in enumerate(whole):
            assert torch.equal(exchange.table(i)[:, :3], table[:, :3])
        exchange = RowExchange(plan, like)
        exchange.sum({i: (rank + 1) * table for i, table in enumerate(whole)})
        for i, table in enumerate(whole):
            assert torch.equal(exchange.own_rows(i), 6 * table[own[i]])
        exchange = RowExchange(plan, like)
        exchange.sum({i: (rank + 1) * table[:, :3] for i, table in enumerate(whole)})
        for i, table in enumerate(whole):
            assert torch.equal(exchange.own_rows(i)[:, :3], 6 * table[own[i], :3])


def bits(folder: Path) -> None:
    """U is the same on all ranks to the bit, and what parts of it are put together to."""
    rank = distributed.get_rank()
    found: dict[str, list[Tensor]] = {}
    for right_factor in ("replicated", "sharded"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(30, 41), torch.nn.Linear(41, 90))
        knobs = {"scope": "matrix", "right_factor": right_factor, "factor_dtype": "bf16"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "Adapprox", "params": {**KNOBS, **knobs}},
        }
        engine = adapprox_ds.initialize(
            model=net, model_parameters=list(net.parameters()), config=config
        )[0]
        generator = torch.Generator().manual_seed(rank)
        for _ in range(20):
            x = torch.randn(5, 30, generator=generator)
            engine.backward(engine(x).square().mean())
            engine.step()
            # The one matrix that lies on both ranks.
            (block,) = shares(engine)
            assert block.u.dtype == block.q.dtype == torch.bfloat16
            everyone: list[Any] = [None, None]
            distributed.all_gather_object(everyone, block.u)
            if right_factor == "replicated":
                assert block.u.any() and torch.equal(*everyone)
            whole = everyone[0] if right_factor == "replicated" else torch.cat(everyone)
            found.setdefault(right_factor, []).append(whole)
        engine.destroy()
    for whole, parts in zip(*found.values(), strict=True):
        assert torch.equal(whole, parts)


def unknown_ranks(stage: int, folder: Path) -> None:
    """Without an engine to ask, ZeRO-2's parameters do not tell the ranks."""
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = Adapprox(net.parameters(), **KNOBS, scope="matrix")
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    batch = batches(1)[0]
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    with pytest.raises(RuntimeError, match=r"adapprox_ds\.attach\(engine\) before the first"):
        engine.step()
    engine.destroy()


#: By number of ranks.
WORLDS: dict[int, dict[str, Callable[[Path], None]]] = {
    1: {"nothing_is_cut_z3": partial(trajectory, 3, 10, SHARDED)},
    2: {
        "trajectory_z1": partial(trajectory, 1, STEPS, REPLICATED),
        "resumes_z3": partial(resumes, 3, **REPLICATED),
        "bits_z1": bits,
    },
    3: {
        "trajectory_z3": partial(trajectory, 3, STEPS, SHARDED),
        "moves_z3": partial(moves, 3, REPLICATED),
        "moves_z2": partial(moves, 2, SHARDED),
        "resumes_z2": partial(resumes, 2, **SHARDED),
        "resumes_z3_small": partial(
            resumes, 3, **SHARDED, first_moment="int8", factor_dtype="bf16"
        ),
        "other_factors_z3": partial(other_factors, 3, REPLICATED, other_u),
        "other_ranks_z2": partial(other_factors, 2, SHARDED, other_rank),
        "exchange_rows": exchange_rows,
        "leaves_out_z2": partial(leaves_out, 2),
        "bytes_z1": partial(bytes_held, 1),
        "bytes_z3": partial(bytes_held, 3),
        "unreadable_z3": partial(unreadable, 3),
        "unknown_ranks_z2": partial(unknown_ranks, 2),
        **{name: partial(run, case) for name, case in WRAPPERS.items()},
    },
    4: {"trajectory_z2": partial(trajectory, 2, STEPS, SHARDED)},
}
if os.environ.get("ADAPPROX_GRID") == "full":
    for world in (1, 2, 3, 4):
        WORLDS.setdefault(world, {}).update(
            {
                f"grid_{world}_z{stage}_{name}": partial(trajectory, stage, STEPS, knobs)
                for stage in (1, 2, 3)
                for name, knobs in (("sharded", SHARDED), ("replicated", REPLICATED))
            }
        )
CASES = {name: case for cases in WORLDS.values() for name, case in cases.items()}
