# SPDX-License-Identifier: Apache-2.0
"""LowRankMoment is logically the dense tensor, whatever is asked of it, and physically factors.

Factors hold small integers, so that every sum is exact and "equal" can mean bitwise equal.
"""

from __future__ import annotations

import copy
import io
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.factors import DOMAINS, Factors, FactorStore, PendingErrors
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.rank import RankPolicy
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.core.layout import Block

POLICY = RankPolicy(minimum=1, maximum=4, step=1, momentum=0.9, threshold=1e-3)
RELAXED = settings(deadline=None, max_examples=100)
#: What lies in a flat tensor, in order: (rows, cols, k) of a block, ("run" or "padding", numel).
Piece = tuple[Any, ...]
MIXED: list[Piece] = [("run", 3), (5, 4, 2), ("padding", 2), (4, 6, 1), ("run", 5), ("padding", 3)]


def make(
    pieces: list[Piece], dtype: torch.dtype = torch.float32, domain: str = "variance"
) -> tuple[LowRankMoment, Tensor]:
    """A moment and the dense tensor that it stands for, the latter made element by element."""
    generator = torch.Generator().manual_seed(len(pieces))
    blocks: list[Factors] = []
    runs: list[tuple[int, int]] = []
    dense: list[float] = []
    logical: list[float] = []
    for piece in pieces:
        offset = len(logical)
        if piece[0] == "padding":
            logical += [0.0] * piece[1]
        elif piece[0] == "run":
            values = [float(offset + i + 1) for i in range(piece[1])]
            runs.append((offset, piece[1]))
            dense += values
            logical += values
        else:
            rows, cols, k = piece
            q = torch.randint(-4, 5, (rows, k), generator=generator).to(dtype)
            u = torch.randint(-4, 5, (cols, k), generator=generator).to(dtype)
            blocks.append(Factors(Block(offset, rows, cols), q, u, k + 0.25, 0.125))
            product = [
                sum(float(q[r, j]) * float(u[c, j]) for j in range(k))
                for r in range(rows)
                for c in range(cols)
            ]
            power = 2 if domain == "std" else 1
            logical += [max(x, 0.0) ** power for x in product]
    runs_end_to_end = torch.tensor(dense, dtype=dtype)
    store = FactorStore(len(logical), blocks, tuple(runs), runs_end_to_end, domain)
    return LowRankMoment(store, (len(logical),), dtype), torch.tensor(logical, dtype=dtype)


def same(a: Any, b: Tensor) -> bool:
    """Bitwise equality with a dense tensor of the same shape and dtype."""
    a = a.to_dense() if isinstance(a, CompactTensor) else a
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def factors_of(moment: LowRankMoment) -> list[Any]:
    """Everything that a store holds, in plain values; errors as text, for NaN's sake."""
    store = moment.store
    blocks = [
        (b.block, b.q.tolist(), b.u.tolist(), b.q.dtype, b.rank, str(b.error))
        for b in store.factors
    ]
    return [store.numel, store.runs, store.domain, store.dense.tolist(), store.dense.dtype, blocks]


def saved(moment: Any, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(moment, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


PIECES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
        st.tuples(st.sampled_from(["run", "padding"]), st.integers(1, 12)),
    ),
    min_size=1,
    max_size=6,
)


def check_reads(moment: CompactTensor, dense: Tensor, data: st.DataObject) -> None:
    """narrow, slices of slices, indices, views and reshapes at arbitrary places."""
    n, kind = len(dense), type(moment)
    a = data.draw(st.integers(0, n), "begin")
    length = data.draw(st.integers(0, n - a), "length")
    assert (moment.shape, moment.dtype, moment.is_whole) == (dense.shape, dense.dtype, True)
    assert same(moment, dense)
    piece, part = moment.narrow(0, a, length), dense[a : a + length]
    assert type(piece) is kind and same(piece, part)
    c, d = (data.draw(st.integers(-n - 2, n + 2), name) for name in "cd")
    assert type(piece[c:d]) is kind and same(piece[c:d], part[c:d])
    assert same(moment[c:], dense[c:]) and same(moment[:d], dense[:d])
    step = data.draw(st.integers(1, 4), "step")
    assert same(piece[::step], part[::step])
    if length:
        i = data.draw(st.integers(-length, length - 1), "index")
        assert same(piece[i], part[i]) and piece[i].item() == part[i].item()
        assert same(piece[torch.tensor([i, 0])], part[torch.tensor([i, 0])])
        rows = data.draw(st.sampled_from([r for r in range(1, length + 1) if length % r == 0]))
        for shape in ((rows, length // rows), (rows, -1), (-1, rows)):
            matrix = piece.view(shape)
            assert type(matrix) is kind and same(matrix, part.view(shape))
            assert same(piece.reshape(shape), part.reshape(shape))
        assert same(matrix[0], part.view(-1, rows)[0])
        assert same(matrix[:, :1], part.view(-1, rows)[:, :1])
        assert same(matrix.T, part.view(-1, rows).T)
        assert type(matrix.view(-1)) is kind and same(matrix.view(-1), part)


def check_computes(moment: CompactTensor, dense: Tensor, cut: int) -> None:
    """Arithmetic, reductions and copies, on the left and on the right, on pieces too."""
    for m, d in ((moment, dense), (moment[cut:], dense[cut:])):
        other = torch.arange(len(d), dtype=d.dtype)
        for op in (operator.add, operator.mul, operator.sub, torch.maximum, operator.lt):
            assert same(op(m, other), op(d, other)) and same(op(other, m), op(other, d))
        assert same(2.0 * m + 1.0, 2.0 * d + 1.0)
        assert same(m.abs().sqrt(), d.abs().sqrt())
        assert same(m.sum(), d.sum()) and same(m.max(), d.max())
        assert same(torch.cat([other, m, m]), torch.cat([other, d, d]))
        assert same(torch.stack([m, other]), torch.stack([d, other]))
        target = torch.full_like(other, torch.nan)
        assert same(target.copy_(m), d)
        assert same(other.clone().add_(m, alpha=3), other.clone().add_(d, alpha=3))
        assert same(torch.zeros_like(m), torch.zeros_like(d))
        assert all(same(a, b) for a, b in zip(m.split(4), d.split(4), strict=True))
    assert torch.equal(moment, dense) and torch.allclose(moment, dense)


@given(PIECES, st.data())
@RELAXED
def test_reads_as_the_dense_tensor(pieces: list[Piece], data: st.DataObject) -> None:
    moment, dense = make(pieces, domain=data.draw(st.sampled_from(DOMAINS)))
    for block in moment.store.factors:
        place = block.block
        matrix = dense[place.offset : place.end].view(place.rows, place.cols)
        assert same(block.reconstruct(moment.store.domain), matrix)
    check_reads(moment, dense, data)


@given(PIECES, st.data())
@RELAXED
def test_computes_as_the_dense_tensor(pieces: list[Piece], data: st.DataObject) -> None:
    moment, dense = make(pieces)
    check_computes(moment, dense, data.draw(st.integers(0, len(dense) - 1), "cut"))


@pytest.mark.parametrize("shape", [(5, -1), (7,), (-1, 3)])
def test_impossible_views_raise(shape: tuple[int, ...]) -> None:
    """A shape of another number of elements."""
    moment, dense = make([("run", 4), (3, 2, 1), ("padding", 1)])
    assert len(dense) == 11
    with pytest.raises(RuntimeError, match="invalid"):
        moment.view(shape)
    with pytest.raises((RuntimeError, IndexError)):
        moment.narrow(0, 8, 4)


def test_padding_reads_zero() -> None:
    """Between and after the pieces, even when everything else is poisoned."""
    moment, dense = make(MIXED)
    for block in moment.store.factors:
        block.q.fill_(torch.nan)
    moment.store.dense.fill_(torch.nan)
    padding = torch.zeros(len(dense), dtype=torch.bool)
    padding[23:25] = padding[-3:] = True
    assert torch.equal(torch.isnan(moment.to_dense()), ~padding)
    assert torch.equal(moment[23:25].to_dense(), torch.zeros(2))
    assert torch.equal(moment[-3:].to_dense(), torch.zeros(3))


def test_pieces_are_lazy() -> None:
    """A piece made before the factors change reads what they are after."""
    moment, before = make(MIXED)
    pieces = [moment[2:30], moment.narrow(0, 40, 14), moment.detach(), moment.view(3, -1)]
    block = moment.store.factors[0]
    block.q, block.u = torch.ones(5, 3), torch.ones(4, 3)
    moment.store.factors[1].u.mul_(2.0)
    moment.store.dense.add_(100.0)
    after = before.clone()
    after[3:23] = 3.0
    after[25:49] *= 2.0
    after[:3] += 100.0
    after[49:54] += 100.0
    assert len(after) == 57 and not torch.equal(before, after)
    expected = [after[2:30], after[40:54], after, after.view(3, -1)]
    assert all(same(piece, value) for piece, value in zip(pieces, expected, strict=True))


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.to(torch.float64, copy=True),
    "to_copy": lambda m: m.to("cpu", copy=True),
    "save": lambda m: saved(m, weights_only=True),
    "save_unsafe": lambda m: saved(m, weights_only=False),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_copies_keep_factors(name: str, dtype: torch.dtype, domain: str) -> None:
    """Bitwise, in their own dtype, and later changes of the original do not reach the copy."""
    moment, dense = make(MIXED, dtype, domain)
    moment.store.factors[1].error = math.nan
    matrix = moment.view(3, -1)
    taken, held = COPIES[name](matrix), factors_of(moment)
    assert isinstance(taken, LowRankMoment) and taken.is_whole and taken.shape == (3, 19)
    cast = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}
    assert taken.dtype == cast.get(name, dtype)
    assert factors_of(taken) == held
    for block in moment.store.factors:
        block.q.zero_()
        block.u, block.rank = torch.ones_like(block.u), 3.5
    moment.store.dense.zero_()
    assert factors_of(taken) == held
    assert same(taken, dense.to(taken.dtype).view(3, -1))


@pytest.mark.parametrize("name", ["detach", "data", "cpu", "to", "contiguous", "view_as"])
def test_aliases_share_factors(name: str) -> None:
    """What an ordinary tensor would not copy is not copied."""
    moment, _ = make(MIXED)
    alias = {
        "detach": moment.detach,
        "data": lambda: moment.data,
        "cpu": moment.cpu,
        "to": lambda: moment.to(torch.float32),
        "contiguous": moment.contiguous,
        "view_as": lambda: moment.view_as(moment),
    }[name]()
    assert isinstance(alias, LowRankMoment) and alias.store is moment.store
    assert alias.shape == moment.shape and not alias.requires_grad


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_pieces_are_dense(name: str) -> None:
    """A piece is copied as an ordinary tensor: it must not drag its parent's factors along."""
    moment, dense = make(MIXED)
    part = dense[2:30]
    taken = COPIES[name](moment[2:30])
    assert type(taken) is Tensor
    assert same(taken, part.to(taken.dtype))
    moment.store.dense.zero_()
    assert same(taken, part.to(taken.dtype))


def test_other_format_version_is_refused() -> None:
    """By a checkpoint of a later release."""
    moment, _ = make(MIXED)
    payload = moment.store.to_payload()
    payload["version"] += 1
    with pytest.raises(ValueError, match=rf"version {payload['version']}.*reads"):
        FactorStore.from_payload(payload)


def test_saving_settles_the_last_errors() -> None:
    """Error ratios on their way to the host set the ranks before a copy is taken."""
    moment, _ = make(MIXED)
    blocks = moment.store.factors
    expected = [
        POLICY.reflect(b.rank, e, b.block.rank_bound)
        for b, e in zip(blocks, (0.5, 0.0), strict=True)
    ]
    moment.store.pending = PendingErrors.start(list(torch.tensor([[0.5], [0.0]])), POLICY, 1)
    loaded = saved(moment, weights_only=True)
    assert [b.rank for b in loaded.store.factors] == expected == [b.rank for b in blocks]
    assert [b.error for b in loaded.store.factors] == [0.5, 0.0]
    assert loaded.store.pending is None and moment.store.pending is None
    moment.store.settle()
    assert [b.rank for b in blocks] == expected


WRITES: dict[str, Callable[[LowRankMoment], Any]] = {
    "mul_": lambda m: m.mul_(2.0),
    "add_tensor": lambda m: m.add_(torch.ones(57)),
    "zero_": lambda m: m.zero_(),
    "fill_": lambda m: m.fill_(1.0),
    "piece": lambda m: m[3:9].fill_(1.0),
    "view": lambda m: m.view(3, -1).zero_(),
    "data": lambda m: m.data.mul_(0.5),
    "assign_data": lambda m: setattr(m, "data", torch.ones(57)),
    "itself": lambda m: m.sqrt_(),
    "out": lambda m: torch.add(torch.ones(57), 1.0, out=m),
    "foreach": lambda m: torch._foreach_mul_([torch.ones(57), m], 2.0),
    "assign_slice": lambda m: m.__setitem__(slice(3, 9), 1.0),
    "assign_all": lambda m: m.__setitem__(slice(None), torch.ones(57)),
    "assign_mask": lambda m: m.__setitem__(torch.ones(57, dtype=torch.bool), 1.0),
    "assign_element": lambda m: m.__setitem__(3, 1.0),
    "assign_row": lambda m: m.view(3, -1).__setitem__(1, 1.0),
    "assign_column": lambda m: m.view(3, -1).__setitem__((slice(None), 1), 1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_raise(name: str) -> None:
    """A write would vanish with a temporary: it raises, names the remedy, changes nothing."""
    moment, dense = make(MIXED)
    with pytest.raises(NotImplementedError, match=r"assign a dense tensor to .*exp_avg_sq"):
        WRITES[name](moment)
    assert same(moment, dense)


@RELAXED
@given(st.lists(st.tuples(st.integers(0, 57), st.integers(0, 57)), max_size=4))
def test_what_is_copied_to_a_piece_is_read(spans: list[tuple[int, int]]) -> None:
    """Blocks' new elements are dense until a step, also in copies and files; the rest stays."""
    moment, dense = make(MIXED)
    padding = [i for i in range(len(dense)) if not covered(moment, i)]
    for i, (a, b) in enumerate(spans):
        a, b = min(a, b, len(dense)), min(max(a, b), len(dense))
        values = torch.arange(float(b - a)) + 100.0 * i
        assert moment[a:b].copy_(values).numel() == b - a
        dense[a:b] = values
    dense[padding] = 0.0
    assert same(moment, dense) and same(moment[7:40], dense[7:40])
    assert same(moment.clone(), dense) and same(moment.to(torch.float64), dense.double())
    loaded = saved(moment, weights_only=True)
    assert same(loaded, dense)
    assert moment.store.allocated_bytes <= make(MIXED)[0].store.allocated_bytes + 4 * 57 * 4


def covered(moment: LowRankMoment, i: int) -> bool:
    """Whether an element lies in a block or run, and not in padding."""
    places = [(b.block.offset, b.block.end) for b in moment.store.factors]
    return any(a <= i < b for a, b in (*places, *((a, a + n) for a, n in moment.store.runs)))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_no_second_moment_is_refused(bad: float) -> None:
    moment, dense = make(MIXED)
    with pytest.raises(ValueError, match="allowed: finite numbers >= 0"):
        moment[3:9].copy_(torch.full((6,), bad))
    assert same(moment, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_bytes_are_accounted(dtype: torch.dtype) -> None:
    """Allocated: k (m + n) a block and the dense runs; ``nbytes``: the dense tensor's."""
    moment, dense = make(MIXED, dtype)
    size = dtype.itemsize
    held = 2 * (5 + 4) + 1 * (4 + 6) + 3 + 5
    assert moment.allocated_bytes == moment.store.allocated_bytes == held * size
    assert moment.to(torch.bfloat16).allocated_bytes == held * size
    assert moment.nbytes == dense.nbytes == 57 * size
    text = repr(moment)
    assert "ranks=[2, 1]" in text and f"bytes={held * size}" in text and "(57,)" in text


@pytest.mark.parametrize(("k0", "kmax", "used"), [(256, 256, 5), (3, 256, 3), (2, 2, 2)])
def test_zeros(k0: int, kmax: int, used: int) -> None:
    """Q_0 = U_0 = 0 of rank k_0 within each block's bound (12 x 10: 5); reads 0, saves memory."""
    policy = RankPolicy(1, kmax, 1, 0.9, 1e-3)
    pieces = [Block(4, 12, 10)], [(0, 4)]
    placed: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    store = FactorStore.zeros(130, *pieces, k0, policy, "variance", **placed)
    (block,) = store.factors
    assert (block.q.shape, block.u.shape) == ((12, used), (10, used))
    assert (block.rank, block.block.rank_bound, block.block.end) == (used, 5, 124)
    assert math.isnan(block.error)
    assert store.allocated_bytes == 4 * (used * 22 + 4) < 4 * 124
    assert torch.equal(store.read(0, 130, torch.float32), torch.zeros(130))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
    ids=["bf16", "fp16", "fp64"],
)
def test_optimizer_load_keeps_factors(dtype: torch.dtype, kept: torch.dtype) -> None:
    """torch.optim casts loaded state to the parameter's dtype; factors stay what they were."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(12, 10).to(dtype))
    optimizer = Adapprox([p], rank_init=2, rank_max=4)
    for _ in range(2):
        p.grad = torch.randn(12, 10).to(dtype)
        optimizer.step()
    optimizer.state[p]["exp_avg_sq"].store.settle()
    held = factors_of(optimizer.state[p]["exp_avg_sq"])
    fresh = Adapprox([p], rank_init=2, rank_max=4)
    fresh.load_state_dict(saved(optimizer.state_dict(), weights_only=True))
    moment = fresh.state[p]["exp_avg_sq"]
    assert isinstance(moment, LowRankMoment)
    assert (moment.shape, moment.dtype) == ((12, 10), dtype)
    assert moment.store.dense.dtype == moment.store.factors[0].q.dtype == kept
    assert factors_of(moment) == held


def test_dense_tensor_in_its_place_is_factored() -> None:
    """As a universal or AdamW checkpoint leaves it, one step tensor shared by all parameters."""
    shapes = {"w": (24, 16), "experts": (3, 10, 8), "b": (11,), "s": ()}
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = Adapprox(list(params.items()), rank_init=4, rank_max=4, error_threshold=0.05)
    shared, expected = torch.tensor(7.0), {}
    for name, p in params.items():
        p.grad = torch.linspace(-1, 2, p.numel()).view(p.shape)
        # A matrix of rank 1, the last dimension being the columns.
        dense = torch.arange(1.0, p.numel() + 1).view(p.shape)
        dense = dense.mean(-1, keepdim=True).expand(p.shape).contiguous() if p.dim() else dense
        expected[name] = 0.999 * dense + 0.001 * p.grad**2
        optimizer.state[p] = {"step": shared, "exp_avg": p.detach() * 0, "exp_avg_sq": dense}
    optimizer.step()
    for name, p in params.items():
        moment = optimizer.state[p]["exp_avg_sq"]
        assert isinstance(moment, LowRankMoment)
        assert len(moment.store.factors) == (name in ("w", "experts"))
        error = (moment.to_dense() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5
        assert int(optimizer.state[p]["step"]) == 8
    assert shared == 7.0, "incremented in place, once for each parameter that shares it"
