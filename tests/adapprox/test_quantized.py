# SPDX-License-Identifier: Apache-2.0
"""First moments in codes: the codes against a naive oracle, and the tensor that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds.adapprox import quantized
from adapprox_ds.adapprox.quantized import (
    GROUP,
    SMALLEST_SCALE,
    QuantizedMatrix,
    QuantizedMoment,
    QuantizedStore,
    Span,
    dequantize,
    group_count,
    quantize,
)
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.core.rounding import rounding_salt
from tests.adapprox.test_moment import COPIES, WRITES, check_computes, check_reads, same, saved
from tests.adapprox.test_moment import make as make_factored

RELAXED = settings(deadline=None, max_examples=100)
#: 57 elements with padding at 23 and 24 and at the end; the order is not that of the offsets.
MIXED: list[Span] = [(25, 4, 6), (3, 5, 4), (0, 1, 3), (49, 1, 5)]
LARGEST = torch.finfo(torch.float32).max


def sample(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries of many magnitudes, as a moment's are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) ** 3
    return (x * 10.0 ** torch.randint(-6, 3, (*shape[:-1], 1), generator=generator)).to(dtype)


def make(
    spans: list[Span], numel: int, dtype: torch.dtype = torch.float32, bits: int = 8
) -> tuple[QuantizedMoment, Tensor]:
    """A moment and the dense tensor that it stands for, the latter made span by span."""
    flat, dense = sample((numel,), numel), torch.zeros(numel)
    for offset, rows, cols in spans:
        here = slice(offset, offset + rows * cols)
        matrix = QuantizedMatrix.of(flat[here].view(rows, cols), bits)
        dense[here] = matrix.load(0, rows).view(-1)
    store = QuantizedStore.from_dense(flat, spans, bits)
    return QuantizedMoment(store, (numel,), dtype), dense.to(dtype)


def contents(moment: Any) -> list[Any]:
    store = moment.store
    kept = [store.codes.dtype, store.scales.dtype, store.codes.tolist(), store.scales.tolist()]
    return [store.numel, store.spans, *kept]


def oracle(row: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Of one row in fp64: codes before rounding, scales, and what the rounded codes stand for."""
    codes: list[float] = []
    scales: list[float] = []
    values: list[float] = []
    for begin in range(0, len(row), GROUP):
        group = row[begin : begin + GROUP]
        scale = max(abs(x) for x in group)
        if not all(math.isfinite(x) for x in group):
            scale = math.nan
        elif scale < SMALLEST_SCALE:
            scale = 0.0
        scales.append(scale)
        for x in group:
            code = 127 * math.sqrt(abs(x) / scale) if scale > 0 else 0.0
            codes.append(math.copysign(code, x))
            values.append(scale * math.copysign((round(code) / 127) ** 2, x))
    return codes, scales, values


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = st.sampled_from([1.0, 1e-8, 1e-30, 2.0**-100, 2.0**-111, 1e-36, 1e-39, 1e-43, 1e30, 3e38])
#: Rows of one magnitude, from subnormal to huge, and rows of anything.
GROUPS = st.one_of(
    st.lists(FLOATS, min_size=1, max_size=140),
    st.tuples(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=140), SIZES).map(
        lambda drawn: [x * drawn[1] for x in drawn[0]]
    ),
)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@given(GROUPS)
@RELAXED
def test_codes_match_the_oracle(row: list[float]) -> None:
    """Codes, save where fp32 falls on the other side of a tie; scales; values; error bounds."""
    x = torch.tensor([row])
    codes, scales = quantize(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (codes.shape, scales.shape) == (x.shape, (1, group_count(len(row))))
    exact, expected_scales, expected = oracle(x[0].tolist())
    assert scales[0].tolist() == expected_scales
    lists = x[0].tolist(), codes[0].tolist(), dequantize(codes, scales)[0].tolist()
    for i, (x_i, code, value) in enumerate(zip(*lists, strict=True)):
        assert abs(code - exact[i]) <= 0.5 + 1e-4
        if code == round(exact[i]):
            assert value == pytest.approx(expected[i], rel=1e-6, abs=0)
        if scale := expected_scales[i // GROUP]:
            of_value = abs(value) * (abs(code) + 0.25) / code**2 if code else scale / 254**2
            assert abs(value - x_i) <= min(scale / 127, of_value) * (1 + 1e-4)


@given(GROUPS)
@RELAXED
def test_four_bits_take_the_nearest_value(row: list[float]) -> None:
    """By a search over all codes in fp64; pairs of codes lie in one byte, the even column low."""
    x = torch.tensor([row])
    codes, scales = quantize(x, 4)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    assert codes.shape == (1, -(-len(row) // 2))
    values = dequantize(codes, scales, torch.float64, len(row))[0].tolist()
    _, expected_scales, _ = oracle(x[0].tolist())
    assert scales[0].tolist() == expected_scales
    for i, (x_i, value) in enumerate(zip(x[0].tolist(), values, strict=True)):
        scale, byte = expected_scales[i // GROUP], int(codes[0, i // 2])
        code = (byte >> 4 if i % 2 else byte & 15) ^ 8
        code -= 8
        assert -7 <= code <= 7
        levels = [math.copysign(scale * (abs(c) / 7) ** 1.5, c) for c in range(-7, 8)]
        assert value == pytest.approx(levels[code + 7], rel=1e-6, abs=0)
        nearest = min(abs(x_i - level) for level in levels)
        assert abs(x_i - value) <= nearest + 1e-6 * scale


def test_four_bits_are_right_on_average() -> None:
    """At random an element takes one of the two values around it; values themselves stay."""
    x = sample((3, 150), seed=4).clamp(-1e3, 1e3)
    groups = x.split([128, 22], dim=1)
    scale = torch.cat([g.abs().amax(1, keepdim=True).expand(g.shape) for g in groups], dim=1)
    matrix, total, steps = QuantizedMatrix.of(x, 4), torch.zeros(3, 150, dtype=torch.float64), 400
    for t in range(steps):
        matrix.store_rows(0, x, 7, rounding_salt(t))
        read = matrix.load(0, 3)
        assert ((read - x).abs() <= 0.2065 * scale).all()
        codes, scales = matrix.codes.clone(), matrix.scales.clone()
        matrix.store_rows(0, read, 7, rounding_salt(t + 1))
        assert torch.equal(matrix.codes, codes) and torch.equal(matrix.scales, scales)
        total += read.double()
    off = (total / steps - x.double()) / scale
    assert off.abs().max() < 5 * 0.5 * 0.2065 / steps**0.5
    assert off.mean().abs() < 5 * 0.5 * 0.2065 / (steps * 450) ** 0.5
    # Which of the two depends on the place and the step: rows alone as in the whole.
    matrix.store_rows(0, x, 7, rounding_salt(3))
    row = QuantizedMatrix.of(x[1:2], 4)
    row.store_rows(0, x[1:2], 157, rounding_salt(3))
    assert torch.equal(row.codes, matrix.codes[1:2])


@pytest.mark.parametrize("kept", [8, 4])
@given(GROUPS)
@RELAXED
def test_requantising_changes_no_bit(kept: int, row: list[float]) -> None:
    """Of codes, scales and values, whatever the magnitude; the largest keeps its very value."""
    x = torch.tensor([row])
    codes, scales = quantize(x, kept)
    values = dequantize(codes, scales, cols=len(row))
    again, scales_again = quantize(values, kept)
    assert torch.equal(codes, again) and torch.equal(bits(scales), bits(scales_again))
    assert torch.equal(bits(values), bits(dequantize(again, scales_again, cols=len(row))))
    for begin in range(0, len(row), GROUP):
        group, read = x[0, begin : begin + GROUP], values[0, begin : begin + GROUP]
        largest = int(group.abs().argmax())
        assert read[largest] == (group[largest] if group.abs().max() >= SMALLEST_SCALE else 0)


@pytest.mark.parametrize("kept", [8, 4])
def test_every_code_survives(kept: int) -> None:
    """All codes under scales of all exponents, at and beside powers of two."""
    codes = torch.tensor([*range(-127, 128), 127], dtype=torch.int8).view(2, GROUP)
    if kept == 4:
        nibbles = torch.tensor([*range(8), *range(9, 16), 7], dtype=torch.uint8).repeat(8)
        codes = torch.stack([nibbles[::2] | nibbles[1::2] << 4] * 2)
    base = [2.0**e for e in range(-110, 128)]
    scales = [s * f for s in base for f in (1.0, 1.0 + 2**-23, 1.37, 2.0 - 2**-23)]
    for scale in [*scales, LARGEST]:
        held = torch.full((2, 1), scale)
        again, scales_again = quantize(dequantize(codes, held), kept)
        assert torch.equal(codes, again) and torch.equal(held, scales_again)


def test_pinned_codes() -> None:
    """As they are in files: a change of any of these needs another format version."""
    x = torch.tensor([[4.0, -4.0, 1.0, -0.25, 0.0, 1e-4, 6e-5, -2.0]])
    codes, scales = quantize(x)
    assert codes.tolist() == [[127, -127, 64, -32, 0, 1, 0, -90]]
    assert scales.tolist() == [[4.0]]
    expected = [4.0, -4.0, 1.0158100, -0.2539525, 0.0, 2.4800049e-4, 0.0, -2.0088040]
    assert dequantize(codes, scales)[0].tolist() == pytest.approx(expected, rel=1e-7)
    assert SMALLEST_SCALE == 2.0**-110
    ties = torch.tensor([[254.0**2, 1.0, 127.0**2]])  # 1/2 and 63 1/2 go to even codes
    assert quantize(ties)[0].tolist() == [[127, 0, 64]]


def test_pinned_four_bits() -> None:
    """As they are in files: a change of any of these needs another format version."""
    x = torch.tensor([[8.0, -8.0, 1.0, -0.22, 0.0, 3.0, -5.0]])
    codes, scales = quantize(x, 4)
    assert codes.tolist() == [[0x97, 0xF2, 0x40, 0x0B]] and scales.tolist() == [[8.0]]
    expected = [8.0, -8.0, 1.2217656, -0.43195939, 0.0, 3.4556751, -4.8294530]
    found = dequantize(codes, scales, cols=7)[0].tolist()
    assert found == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cols", [128, 300])
@pytest.mark.parametrize("kept", [8, 4])
def test_not_a_number_shows(poison: float, cols: int, kept: int) -> None:
    """In its whole group and in no other; also when quantised again."""
    x = sample((3, cols))
    expected = dequantize(*quantize(x, kept))
    x[1, 5] = poison
    first = torch.zeros_like(x, dtype=torch.bool)
    first[1, :GROUP] = True
    codes, scales = quantize(x, kept)
    for _ in range(2):
        read = dequantize(codes, scales)
        assert torch.equal(torch.isnan(read), first)
        assert torch.equal(read[~first], expected[~first])
        assert not codes[1, : GROUP * kept // 8].any() and int(torch.isnan(scales).sum()) == 1
        codes, scales = quantize(read, kept)


@pytest.mark.parametrize("flush", [False, True])
def test_tiny_groups_read_zero(flush: bool) -> None:
    """Below the smallest scale; and results do not depend on subnormal numbers."""
    below = SMALLEST_SCALE * (1 - 2**-20)
    x = torch.tensor([1e-45, 1e-40, below, SMALLEST_SCALE]).view(4, 1).repeat(1, 4)
    x[3, 1:] = torch.tensor([2.0**-126, 2.0**-127, 2.0**-149])
    try:
        if flush and not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        codes, scales = quantize(x)
        values = dequantize(codes, scales)
    finally:
        torch.set_flush_denormal(False)
    assert not codes[:3].any() and not scales[:3].any() and not values[:3].any()
    assert codes[3].tolist() == [127, 0, 0, 0]
    assert values[3].tolist() == [SMALLEST_SCALE, 0, 0, 0]


@pytest.mark.parametrize("cols", [1, 100, 128, 129, 256, 384, 500])
@pytest.mark.parametrize("kept", [8, 4])
def test_rows_are_independent(cols: int, kept: int) -> None:
    """Any range of rows has the codes and scales that it has in the whole, strided ones too."""
    x = sample((7, cols))
    codes, scales = quantize(x, kept)
    assert scales.shape == (7, -(-cols // 128))
    for a, b in [(0, 7), (2, 5), (6, 7), (3, 3)]:
        for part in (x[a:b], x[a:b].clone(), x.T.contiguous().T[a:b]):
            here, scale = quantize(part, kept)
            assert torch.equal(here, codes[a:b]) and torch.equal(scale, scales[a:b])
        read = dequantize(codes, scales, cols=cols)
        assert torch.equal(dequantize(codes[a:b], scales[a:b], cols=cols), read[a:b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Are taken as fp32 and read rounded."""
    x = sample((3, 150), dtype=dtype).clamp(-1e3, 1e3)
    codes, scales = quantize(x)
    for got, expected in zip((codes, scales), quantize(x.float()), strict=True):
        assert torch.equal(got, expected)
    assert same(dequantize(codes, scales, dtype), dequantize(codes, scales).to(dtype))


def spans_of(pieces: list[tuple[int, int, int]]) -> tuple[list[Span], int]:
    """Of (padding before, rows, cols); the last padding ends the tensor."""
    spans, at = [], 0
    for padding, rows, cols in pieces:
        spans.append((at + padding, rows, cols))
        at += padding + rows * cols
    return spans, at + pieces[0][0]


PIECES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from([1, 3, 8, 128, 131, 260])),
    min_size=1,
    max_size=4,
)


@given(PIECES, st.data())
@RELAXED
def test_reads_as_the_dense_tensor(pieces: list[Span], data: st.DataObject) -> None:
    """Also where a range takes many chunks."""
    spans, numel = spans_of(pieces)
    kept = data.draw(st.sampled_from([8, 4]))
    moment, dense = make(data.draw(st.permutations(spans)), numel, bits=kept)
    before, quantized._CHUNK = quantized._CHUNK, data.draw(st.sampled_from([128, 256, 1 << 22]))
    try:
        check_reads(moment, dense, data)
        made = QuantizedStore.from_dense(dense, moment.store.spans, kept)
        assert torch.equal(made.codes, moment.store.codes)
        assert torch.equal(made.scales, moment.store.scales)
    finally:
        quantized._CHUNK = before
    check_computes(moment, dense, data.draw(st.integers(0, len(dense) - 1), "cut"))


def test_large_tensors_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and quantising take temporaries of a chunk at most."""
    sizes: list[int] = []
    groups = quantized._groups

    def watched(cells: Tensor, scales: Tensor) -> Any:
        sizes.append(cells.numel())
        return groups(cells, scales)

    monkeypatch.setattr(quantized, "_CHUNK", 512)
    monkeypatch.setattr(quantized, "_groups", watched)
    store = QuantizedStore.from_dense(sample((4000,)), [(0, 10, 200), (2000, 1, 2000)])
    assert sizes[::2] == [400] * 5 + [512] * 3 + [464]
    sizes.clear()
    store.read(150, 2700, torch.float32)
    assert sizes == [72, 400, 400, 400, 400, 200, 512, 188]


def test_both_moments_meet() -> None:
    """One operation over both kinds."""
    (first, m), (second, v) = make(MIXED, 57), make_factored([("run", 7), (5, 10, 2)])
    assert same(first / (second.sqrt() + 1), m / (v.sqrt() + 1))
    assert same(second + first, v + m) and same(torch.stack([first, second]), torch.stack([m, v]))
    for total in (torch._foreach_add([first, second], 1.0), torch._foreach_add([second, first], 1)):
        assert type(total[0]) is Tensor
    for written, other in ((first, second), (second, first)):
        with pytest.raises(NotImplementedError, match=r"dense tensor to state\['exp_avg"):
            written.add_(other)


def test_padding_reads_zero() -> None:
    """Even when all scales are poisoned; its codes stay 0."""
    moment, _ = make(MIXED, 57)
    padding = torch.zeros(57, dtype=torch.bool)
    padding[23:25] = padding[-3:] = True
    assert not moment.store.codes[padding].any()
    moment.store.scales.fill_(torch.nan)
    assert torch.equal(torch.isnan(moment.to_dense()), ~padding)
    assert torch.equal(moment[23:25].to_dense(), torch.zeros(2))


def test_matrices_share_the_store() -> None:
    """Rows are loaded and stored; pieces made before read what is there after."""
    spans = [(300, 4, 150), (2, 1, 290)]
    moment, before = make(spans, 903)
    matrix, run = moment.store.matrix(0), moment.store.matrix(1)
    assert (len(matrix), matrix.codes.shape, matrix.scales.shape) == (4, (4, 150), (4, 2))
    assert (len(run), run.codes.shape, run.scales.shape) == (1, (1, 290), (1, 3))
    assert same(matrix.load(1, 3), before[450:750].view(2, 150))
    assert same(run.load(0, 1, torch.float64), before[2:292].view(1, 290).double())
    piece, new = moment[310:880], sample((2, 150), seed=9)
    matrix.store_rows(1, new)
    run.store_rows(0, torch.ones(1, 290))
    expected = before.clone()
    expected[450:750] = dequantize(*quantize(new)).view(-1)
    expected[2:292] = 1.0
    assert same(piece, expected[310:880]) and same(moment, expected)


@pytest.mark.parametrize("kept", [8, 4])
def test_resharding_by_rows_is_exact(kept: int) -> None:
    """A span of some rows of a matrix has those rows' codes, wherever it lies."""
    x = sample((9, 200))
    whole = QuantizedStore.from_dense(x, [(0, 9, 200)], kept).matrix(0)
    for a, b, at in [(0, 4, 3), (4, 9, 0), (8, 9, 17)]:
        flat = torch.full((2000,), 7.0)
        flat[at : at + (b - a) * 200] = x[a:b].view(-1)
        part = QuantizedStore.from_dense(flat, [(at, b - a, 200)], kept).matrix(0)
        assert torch.equal(part.codes, whole.codes[a:b])
        assert torch.equal(part.scales, whole.scales[a:b])


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kept", [8, 4])
def test_copies_keep_codes(name: str, dtype: torch.dtype, kept: int) -> None:
    """Bitwise, in their own dtypes, and later changes of the original do not reach the copy."""
    moment, dense = make(MIXED, 57, dtype, kept)
    taken, held = COPIES[name](moment.view(3, -1)), contents(moment)
    assert type(taken) is QuantizedMoment and taken.is_whole and taken.shape == (3, 19)
    cast = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}
    assert taken.dtype == cast.get(name, dtype)
    assert contents(taken) == held
    moment.store.codes.zero_()
    moment.store.scales.fill_(5.0)
    assert contents(taken) == held
    assert same(taken, dense.to(taken.dtype).view(3, -1))


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_pieces_are_dense(name: str) -> None:
    moment, dense = make(MIXED, 57)
    taken = COPIES[name](moment[2:30])
    assert type(taken) is Tensor
    moment.store.codes.zero_()
    assert same(taken, dense[2:30].to(taken.dtype))


@pytest.mark.parametrize("name", ["detach", "cpu", "contiguous"])
def test_aliases_share_codes(name: str) -> None:
    moment, _ = make(MIXED, 57)
    for alias in (getattr(moment, name)(), moment.data, moment.to(torch.float32)):
        assert type(alias) is QuantizedMoment and alias.store is moment.store


@pytest.mark.parametrize("name", WRITES)
def test_writes_raise(name: str) -> None:
    """And name the first moment's key."""
    moment, dense = make(MIXED, 57)
    write: Callable[[CompactTensor], Any] = WRITES[name]
    with pytest.raises(NotImplementedError, match=r"assign a dense tensor to state\['exp_avg'\]"):
        write(moment)
    assert same(moment, dense)


@RELAXED
@given(st.integers(0, 57), st.integers(0, 57))
def test_what_is_copied_to_a_piece_is_quantised(a: int, b: int) -> None:
    """As a new moment would be where rows are replaced; other rows keep their bits."""
    moment, dense = make(MIXED, 57)
    a, b = min(a, b), max(a, b)
    new = dense.clone()
    new[a:b] = sample((57,), 3)[a:b]
    moment[a:b].copy_(new[a:b])
    expected = dense.clone()
    for offset, rows, cols in MIXED:
        for at in range(offset, offset + rows * cols, cols):
            if a < at + cols and at < b:
                row = new[at : at + cols].view(1, -1)
                expected[at : at + cols] = dequantize(*quantize(row)).view(-1)
    assert same(moment, expected)


def test_bytes_are_accounted() -> None:
    """1 + 4 / 128 an element where the group divides the columns; also without any memory."""
    moment, dense = make(MIXED, 57)
    assert moment.allocated_bytes == moment.store.allocated_bytes == 57 + 4 * (4 + 5 + 1 + 1)
    assert moment.nbytes == dense.nbytes == 4 * 57
    text = repr(moment)
    assert "QuantizedMoment(shape=(57,)" in text and "spans=4" in text and "bytes=101" in text
    store = QuantizedStore.zeros(10 * 1024, [(0, 10, 1024)], "meta")
    assert store.allocated_bytes == 10 * 1024 * 1.03125
    four = QuantizedStore.zeros(10 * 1024, [(0, 10, 1024)], "meta", 4)
    assert four.allocated_bytes == four.bytes_between(0, 10 * 1024) == 10 * 1024 * 0.53125
    odd = make(MIXED, 57, bits=4)[0].store  # rows begin with a byte of their own
    assert odd.allocated_bytes == 4 * 3 + 5 * 2 + 2 + 3 + 4 * (4 + 5 + 1 + 1)
    held = QuantizedMoment(store, (10, 1024), torch.float32)
    assert held.device.type == "meta" and held.view(-1)[5:900].to_dense().shape == (895,)


def test_zeros() -> None:
    store = QuantizedStore.zeros(57, MIXED)
    assert torch.equal(store.read(0, 57, torch.float32), torch.zeros(57))
    assert store.read(3, 3, torch.float64).shape == (0,) and store.device.type == "cpu"
    for numel in (0, 8):  # a shard of padding alone
        empty = QuantizedStore.from_dense(torch.ones(numel), [])
        assert same(QuantizedMoment(empty, (numel,), torch.float32), torch.zeros(numel))


@pytest.mark.parametrize("spans", [[(0, 2, 3), (5, 1, 1)], [(1, 3, 3)], [(-1, 1, 2)]])
def test_impossible_spans_raise(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="overlaps its neighbour or leaves"):
        QuantizedStore.zeros(9, spans)


def test_other_payloads_are_refused() -> None:
    """Of a later release, or of parts that do not fit."""
    payload = saved(make(MIXED, 57)[0], weights_only=True).store.to_payload()
    with pytest.raises(ValueError, match="version 1.*reads 2"):
        QuantizedStore.from_payload(payload | {"version": 1})
    with pytest.raises(ValueError, match=r"scales has shape \(3,\)"):
        QuantizedStore.from_payload(payload | {"scales": torch.zeros(3)})
