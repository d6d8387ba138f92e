# SPDX-License-Identifier: Apache-2.0
"""A run saved on one set of ranks continues on another. Run by test_universal.py.

What a checkpoint should hold is gathered from the running optimizers, not read from any file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import deepspeed
import torch
from torch import Tensor, nn

import adapprox_ds
from adapprox_ds.checkpoint import convert, load_universal
from tests.checkpoint.micro_moves import compare_window
from tests.methods import WIDE
from tests.zero.cases_stages import CPU, Z2, Z3, Case, adapprox_of, config_of

HALF = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "emb": (61, 40),
    "w1": (48, 56),
    "conv": (16, 8, 3, 3),
    "frozen": (6, 5),
    "w2": (9, 20),
    "unused": (20, 17),
    "norm": (3,),
    "bias": (2,),
}
#: The second group is 5 elements: on four ranks one holds padding only.
NO_DECAY = ("norm", "bias")
KNOBS: dict[str, Any] = {
    "rank_init": 3,
    "rank_max": 8,
    "rank_step": 3,
    "error_threshold": 0.05,
    "oversampling": 2,
}
PAPER: dict[str, Any] = {"preset": "paper", "rank_init": 3, "rank_max": 8, "rank_step": 3}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 20}}


def case(zero: dict[str, Any], precision: str = "fp32", **more: Any) -> Case:
    extra = {"scheduler": SCHEDULER, "checkpoint": {}}
    return Case(zero, precision, knobs={**KNOBS, **more.pop("knobs", {})}, extra=extra, **more)


#: Kinds whose group without decay has settings of its own, so that not all groups agree on them.
MIXED: dict[str, dict[str, Any]] = {
    kind: {"momentum": "gradient"} for kind in ("z2_mixed", "z3_mixed")
}

KINDS: dict[str, Case] = {
    "z1": case({"stage": 1}, "bf16"),
    "z2": case(Z2),
    "z3": case(Z3, "bf16"),
    "bf16": case({"stage": 1}, "bf16_fp32acc"),
    "z1_fp32": case({"stage": 1}),
    "z1_fp16": case({"stage": 1}, "fp16"),
    "z3_fp32": case(Z3),
    "z3_fp16": case(Z3, "fp16"),
    "z1_robin": case({"stage": 1, "round_robin_gradients": True}, "bf16"),
    "z2_aligned": case({**Z2, "parameter_alignment": True}, "fp16"),
    "z2_offload": case({**Z2, **CPU}, "bf16"),
    "z3_sub": case({**Z3, "sub_group_size": 300}, "bf16"),
    "z3_init": case({**Z3, "sub_group_size": 300}, "fp16", zero_init=True),
    "z3_kept": case({"stage": 3}),  # all parameters persist on every rank
    "z0": Case(None, "bf16", knobs=KNOBS, extra={"scheduler": SCHEDULER}),
    "z1_paper": case({"stage": 1}, "bf16", knobs=PAPER),
    "z3_paper": case(Z3, knobs=PAPER),
    "z3_short": case(Z3, "bf16", knobs={"first_moment": "bf16", "momentum": "update"}),
    "z2_low": case(Z2, knobs={"rank_max": 3}),
    "z1_update": case({"stage": 1}, "bf16", knobs={"momentum": "update"}),
    "z3_update": case(Z3, knobs={"momentum": "update"}),
    "z2_mixed": case(Z2, knobs={"momentum": "update"}),
    "z3_mixed": case(Z3, knobs={"momentum": "update"}),
}


KINDS |= {
    f"{kind}_micro": Case(
        KINDS[kind].zero,
        KINDS[kind].precision,
        method="micro",
        zero_init=KINDS[kind].zero_init,
        extra=KINDS[kind].extra,
    )
    for kind in ("z1", "z2", "z3", "bf16", "z0", "z1_robin", "z2_offload", "z3_init")
}
KINDS["z2_micro_wide"] = Case(Z2, method="micro", knobs=WIDE, extra=KINDS["z2"].extra)

#: All that the state can be kept in, at every stage that shards it.
KEPT: dict[str, dict[str, Any]] = {
    f"m{first}_f{factor}": {**moment, "factor_dtype": kept_in}
    for first, moment in (
        ("32", {}),
        ("16", {"first_moment": "bf16"}),
        ("8", {"first_moment": "int8"}),
        ("0", {"first_moment": "none", "betas": (0.0, 0.999)}),
    )
    for factor, kept_in in (("32", "fp32"), ("16", "bf16"))
}
KINDS |= {
    f"{stage}_{name}": case(zero, precision, knobs=knobs)
    for name, knobs in KEPT.items()
    for stage, zero, precision in (
        ("z1", {"stage": 1}, "bf16"),
        ("z2", Z2, "fp32"),
        ("z3", Z3, "bf16"),
    )
}
KINDS |= {
    f"z0_{name}": Case(None, "bf16", knobs={**KNOBS, **knobs}, extra={"scheduler": SCHEDULER})
    for name, knobs in KEPT.items()
}


class Cell(nn.Module):
    """One parameter and a buffer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, coefficient: Tensor) -> Tensor:
        return (self.weight * coefficient.to(self.weight.dtype)).sum()


class Traveller(nn.Module):
    """Frozen, tied and unused parameters; every gradient is known and the same on any world."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleDict({name: Cell(shape) for name, shape in SHAPES.items()})
        self.tied = self.cells["w1"]
        self.cells["frozen"].weight.requires_grad_(False)

    def forward(self, step: int, factor: float) -> Tensor:
        total = torch.zeros(())
        for name, cell in self.cells.items():
            if name in ("unused", "frozen"):
                continue
            halves = 2 if name == "w1" else 1
            c = factor / halves * coefficient(name, step)
            total = total + cell(c) + (self.tied(c) if halves == 2 else 0.0)
        return total


def start_value(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return torch.randint(-127, 128, SHAPES[name], generator=generator) / 64.0


def coefficient(name: str, step: int) -> Tensor:
    """Gradients of rows and columns of different size, multiples of 1/32 (exact in bf16)."""
    generator = torch.Generator().manual_seed(crc32(f"{name} {step}".encode()))
    values = torch.randint(-7, 8, SHAPES[name], generator=generator) / 32.0
    rows = torch.tensor([1.0, 2.0, 4.0])[torch.arange(SHAPES[name][0]) % 3]
    return values * rows.reshape(-1, *[1] * (values.dim() - 1))


def start(kind: str, *, empty: bool = False, **more: Any) -> tuple[Any, Traveller]:
    """An engine; ``empty``: all that a checkpoint should bring is zero."""
    c = KINDS[kind]
    config = {**config_of(c), **more}
    torch.manual_seed(0)
    if c.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Traveller()
    else:
        model = Traveller()
    for name, cell in model.cells.items():
        with deepspeed.zero.GatheredParameters([cell.weight], modifier_rank=0, enabled=c.zero_init):
            if cell.weight.numel():
                cell.weight.data.copy_(start_value(name) * (0.0 if empty else 1.0))
        cell.seen.fill_(0.0 if empty else len(name))
    members = {name: cell.weight for name, cell in model.cells.items()}
    groups = [
        {"params": [p for n, p in members.items() if n not in NO_DECAY]},
        {"params": [p for n, p in members.items() if n in NO_DECAY], "weight_decay": 0.0},
    ]
    groups[1] |= MIXED.get(kind, {})
    engine = adapprox_ds.initialize(model=model, model_parameters=groups, config=config)[0]
    return engine, model


def train(engine: Any, first: int, last: int) -> None:
    """Rank 0 alone has gradients, so that the mean over ranks is the same on any world."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for step in range(first, last):
        loss = engine(step, float(world) if rank == 0 else 0.0)
        engine.backward(loss)
        engine.step()


def gather(engine: Any) -> dict[str, dict[str, Tensor]]:
    """By parameter: fp32, exp_avg, v, and ``raw``, what is factored, before it is clamped.

    Of MicroAdam instead of ``raw`` the error, and 1 where a fragment begins.
    """
    optimizer = adapprox_of(engine)
    parts: list[tuple[str, int, dict[str, Tensor]]] = []
    for flat, state in optimizer.state.items():
        layout = optimizer.shards.layouts[flat]
        store = state["exp_avg_sq"].store
        v = state["exp_avg_sq"].to_dense().view(-1)
        values = {
            "fp32": flat.detach().view(-1),
            "exp_avg": state.get("exp_avg", torch.zeros_like(flat)).view(-1),
            "v": v,
        }
        if "error" in state:
            values["error"] = state["error"].to_dense().view(-1)
            values["begins"] = torch.zeros_like(v)
            for part in layout.fragments:
                values["begins"][part.fragment.offset] = 1.0
        else:
            store.settle()
            values["raw"] = raw = v.sqrt() if store.domain == "std" else v.clone()
            for b in store.factors:
                raw[b.block.offset : b.block.end] = (b.q.float() @ b.u.float().T).view(-1)
        for part in layout.fragments:
            f = part.fragment
            here = slice(f.offset, f.offset + f.numel)
            parts.append((f.name, f.start, {k: t[here].clone() for k, t in values.items()}))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, parts)
    whole: dict[str, dict[str, Tensor]] = {}
    for name, begin, held in sum(everyone, []):
        size = math.prod(SHAPES[name.split(".")[1]])
        for key, values in held.items():
            target = whole.setdefault(name, {}).setdefault(key, torch.full((size,), math.nan))
            target[begin : begin + values.numel()] = values
    assert all(not t.isnan().any() for p in whole.values() for t in p.values())
    return whole


def save(kind: str, folder: Path, **options: Any) -> None:
    """Train, save, convert; and the unbroken run, and one whose second half saw other data."""
    rank = torch.distributed.get_rank()
    engine, _ = start(kind)
    train(engine, 0, HALF)
    engine.save_checkpoint(str(folder / "run"), client_state={"mine": [1, 2]})
    record: dict[str, Any] = {"saved": gather(engine), "lr": engine.get_lr()}
    train(engine, HALF, 2 * HALF)
    record["unbroken"] = gather(engine)
    engine.destroy()
    engine, _ = start(kind)
    train(engine, 0, HALF)
    train(engine, 2 * HALF, 3 * HALF)
    record["other"] = gather(engine)
    engine.destroy()
    if rank == 0:
        torch.save(record, folder / "record.pt")
        tag = (folder / "run" / "latest").read_text()
        convert(folder / "run", folder / "run" / f"{tag}_universal", workers=1, **options)
    torch.distributed.barrier()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / (b.double().norm() + 1e-30))


def truncation(matrix: Tensor, rank: int) -> float:
    """The Frobenius error of the best approximation of a rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


def compare_second_moment(engine: Any, record: dict[str, Any]) -> int:
    """Equal within 1e-6, or at the rank limit and as good as a truncation can be.

    Returns:
        How many of this rank's blocks were recompressed.
    """
    optimizer = adapprox_of(engine)
    recompressed = 0
    for flat, state in optimizer.state.items():
        layout, store = optimizer.shards.layouts[flat], state["exp_avg_sq"].store
        v = state["exp_avg_sq"].to_dense().view(-1)
        factors = iter(store.factors)
        for part in layout.fragments:
            saved = record["saved"][part.fragment.name]
            for run in part.runs:
                expected = saved["v"][run.start : run.start + run.numel]
                torch.testing.assert_close(run.view(v), expected, rtol=1e-6, atol=1e-12)
            if (block := part.block) is not None:
                f = next(factors)
                begin = block.first_row * block.cols
                rows = slice(begin, begin + block.numel)
                expected = saved["v"][rows].view(block.rows, block.cols)
                # What was dense or is recompressed is rounded where factors are short.
                slack = 2**-8 if f.q.dtype == torch.bfloat16 else 0.0
                if relative(block.view(v), expected) <= 1e-6 + 2 * slack:
                    continue
                recompressed += 1
                limit = min(record.get("rank_max", KNOBS["rank_max"]), block.rank_bound)
                assert f.q.shape[1] == limit, f"{block}: changed at rank {f.q.shape[1]}"
                raw = saved["raw"][rows].view(block.rows, block.cols)
                clamped = raw.clamp(min=0)
                error = float((f.reconstruct("variance") - clamped).double().norm())
                best = max(truncation(raw, limit), truncation(clamped, limit))
                rounding = slack * float(clamped.norm())
                assert error <= 1.001 * best + rounding, (
                    f"{block}: off by {error}, truncation by {best}"
                )
    return recompressed


def compare_first_moment(name: str, found: Tensor, saved: Tensor, kept: str) -> None:
    """Equal to the bit, but for codes of rows that a cut goes through: their groups are others."""
    if kept != "int8":
        assert torch.equal(found, saved), f"first moment of {name}"
        return
    assert (found - saved).abs().max() <= saved.abs().max() / 100, name
    shape = SHAPES[name.split(".")[1]]
    rows = max(8, shape[0]) if len(shape) > 1 else 1
    cut = 2 * torch.distributed.get_world_size() + 4
    assert int((found != saved).sum()) <= cut * -(-saved.numel() // rows), name


def compare(engine: Any, model: Traveller, record: dict[str, Any]) -> None:
    """What was loaded is what was saved."""
    found, optimizer = gather(engine), adapprox_of(engine)
    windowed = "window" in optimizer.param_groups[0]
    for name, saved in record["saved"].items():
        assert torch.equal(found[name]["fp32"], saved["fp32"]), f"weights of {name}"
        if windowed:
            compare_window(name, found[name], saved)
        else:
            kept = optimizer.param_groups[0]["first_moment"]
            compare_first_moment(name, found[name]["exp_avg"], saved["exp_avg"], kept)
    if not windowed:
        compare_second_moment(engine, record)
    assert {int(s["step"]) for s in optimizer.state.values()} == {HALF}
    assert engine.global_steps == HALF
    assert engine.get_lr() == record["lr"]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    for name, cell in model.cells.items():
        assert torch.equal(cell.seen.float(), torch.full((3,), float(len(name)))), "buffer"
        sharded = hasattr(cell.weight, "ds_id")
        with deepspeed.zero.GatheredParameters([cell.weight], enabled=sharded):
            low = cell.weight.detach()
            full = found.get(f"cells.{name}.weight", {}).get("fp32")
            expected = start_value(name) if full is None else full.view(SHAPES[name])
            assert torch.equal(low, expected.to(low.dtype)), f"the model's {name}"


def follow(engine: Any, record: dict[str, Any], share: float = 0.25) -> None:
    """Trained on, the run stays close to the unbroken one, measured by one that saw other data.

    Not equal to it: blocks and the clipping of updates are those of the new partition.
    """
    train(engine, HALF, 2 * HALF)
    found = gather(engine)
    noise, distance = (
        math.sqrt(sum(float((run[n]["fp32"] - p["fp32"]).square().sum()) for n, p in pairs))
        for run in (record["other"], found)
        for pairs in [record["unbroken"].items()]
    )
    assert distance <= share * noise, f"{distance} from the unbroken run; other data: {noise}"


def load(source: str, kind: str, folder: Path, **more: Any) -> None:
    """Into an engine that knows nothing; compare; train on."""
    record = torch.load(folder.parent / f"save_{source}" / "record.pt")
    engine, model = start(kind, empty=True, **more)
    path, client = load_universal(engine, folder.parent / f"save_{source}" / "run")
    assert path.endswith("_universal")
    assert client["mine"] == [1, 2]
    compare(engine, model, record)
    follow(engine, record)
    engine.destroy()


WORLDS_SAVE, WORLDS_LOAD = (1, 2, 3), (1, 2, 4)
GRID = ("z1", "z2", "z3", "bf16")


class _Cases(dict[str, Callable[[Path], None]]):
    """Makes a case as it is looked up: there are 48,000, of which a world runs a few.

    They are ``save_KIND_RANKS`` and ``load_KIND_RANKS_to_KIND_RANKS``.
    """

    def __missing__(self, name: str) -> Callable[[Path], None]:
        verb, _, rest = name.partition("_")
        source, _, target = rest.partition("_to_")
        kind, world = source.rsplit("_", 1)
        if kind not in KINDS or kind == "z0" or int(world) not in (*WORLDS_SAVE, 4):
            raise KeyError(name)
        if verb == "save" and not target:
            return partial(save, kind)
        to, new = target.rsplit("_", 1)
        if verb != "load" or to not in KINDS or int(new) not in WORLDS_LOAD:
            raise KeyError(name)
        return partial(load, source, to)


CASES = _Cases()
