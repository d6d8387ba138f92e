# SPDX-License-Identifier: Apache-2.0
"""Windows and errors moved to other cuts of a parameter, and kept as payloads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds import MicroAdam
from adapprox_ds.core.layout import ParamFragment, ShardLayout
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.grid import Grid, cut, slots_of
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.quantize import dequantize, pack, quantize, shrink, unpack
from adapprox_ds.micro_adam.reshard import fill_error, fill_window, join_errors, join_windows
from adapprox_ds.micro_adam.state import new_stores
from adapprox_ds.micro_adam.window import WindowStore

NUMEL = 500
PADDING = 3
KNOBS: dict[str, Any] = {
    "block_size": 64,
    "quant_block_size": 16,
    "density": 0.1,
    "window": 4,
}


def layouts(edges: list[int]) -> list[ShardLayout]:
    """One shard a rank; each with padding before and after the fragment."""
    return [
        ShardLayout.build(
            [ParamFragment("w", (NUMEL,), lo, hi - lo, PADDING)], hi - lo + 2 * PADDING
        )
        for lo, hi in pairwise([0, *sorted(edges), NUMEL])
    ]


def saved(edges: list[int], **knobs: Any) -> tuple[WindowStore, ErrorStore]:
    """What a converter makes of shards that were trained for six steps."""
    windows, errors = [], []
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, NUMEL, generator=generator)
    for layout in layouts(edges):
        f = layout.fragments[0].fragment
        p = torch.nn.Parameter(torch.zeros(layout.numel))
        optimizer = MicroAdam([p], **KNOBS | knobs)
        optimizer.shards.layouts[p] = layout
        del optimizer.shards._names[p]  # a shard, not a parameter of this shape
        for g in gradients:
            p.grad = torch.full((layout.numel,), torch.nan)
            p.grad[PADDING:-PADDING] = g[f.start : f.start + f.numel]
            optimizer.step()
        assert not p[:PADDING].any() and not p[-PADDING:].any()
        state = optimizer.state[p]
        windows.append((state["exp_avg"].store, f.offset, f.numel))
        errors.append((state["error"].store, f.offset, f.numel))
    return join_windows(NUMEL, windows), join_errors(NUMEL, errors)


def loaded(
    whole: WindowStore, whole_error: ErrorStore, edges: list[int], **knobs: Any
) -> tuple[WindowStore, ErrorStore]:
    """The same after a load on other ranks, put together again."""
    h = MicroHyperparameters(**KNOBS | knobs)
    windows, errors = [], []
    for layout in layouts(edges):
        f = layout.fragments[0].fragment
        mine, rest = new_stores(layout, h, torch.float32, "cpu")
        fill_window(whole, mine, f.offset, f.numel)
        fill_error(whole_error, rest, f.offset, f.numel)
        windows.append((mine, f.offset, f.numel))
        errors.append((rest, f.offset, f.numel))
    return join_windows(NUMEL, windows), join_errors(NUMEL, errors)


def rows_of(store: WindowStore) -> Tensor:
    """The ring, dense: (window, NUMEL)."""
    dense = torch.zeros(store.window, NUMEL)
    for i, span in enumerate(store.spans):
        indices, values = store.entries(i)
        for block in range(span.rows):
            begin = (span.start // store.grid.block + block) * store.grid.block
            at = begin + indices[:, block].long()
            assert bool(((at >= span.start) & (at < span.end - span.offset + span.start)).all())
            dense.scatter_add_(1, at, values[:, block].float())
    return dense


edges = st.lists(st.integers(1, NUMEL - 1), max_size=3, unique=True)


@settings(max_examples=40, deadline=None)
@given(old=edges, new=edges, alpha=st.sampled_from([0.0, 0.125]))
def test_any_partition_to_any_other(old: list[int], new: list[int], alpha: float) -> None:
    """Whole blocks to the bit; of parts the largest entries; errors within half a unit."""
    window, error = saved(old, alpha=alpha)
    window_after, error_after = loaded(window, error, new)
    assert window_after.step == 6
    before, after = rows_of(window), rows_of(window_after)
    for span, slots in zip(window_after.spans, window_after.slots, strict=True):
        for begin in range(span.start, span.start + span.numel, span.cols):
            here = slice(begin, begin + span.cols)
            for was, now in zip(before[:, here], after[:, here], strict=True):
                kept = now != 0
                assert torch.equal(now[kept], was[kept])
                assert int(kept.sum()) == min(slots, int((was != 0).sum()))
                dropped = was[(was != 0) & ~kept].abs()
                if len(dropped):
                    assert now[kept].abs().min() >= dropped.max()
            if not any(edge // 64 == begin // 64 and edge % 64 for edge in (*old, *new)):
                assert torch.equal(before[:, here], after[:, here])
    dense, again = (e.read(0, NUMEL, torch.float32) for e in (error, error_after))
    cuts = sorted({*old, NUMEL})
    for begin in range(0, NUMEL, 16):
        here = slice(begin, min(begin + 16, NUMEL))
        if any(begin < edge < here.stop for edge in cuts):
            unit = (dense[here].max() - dense[here].min()) / 15
            assert (dense[here] - again[here]).abs().max() <= unit * 0.5 + 1e-6
        else:
            assert torch.equal(dense[here], again[here])


@pytest.mark.parametrize("window", [2, 9])
def test_a_window_of_another_length_keeps_the_latest_rows(window: int) -> None:
    store, error = saved([130])
    after, _ = loaded(store, error, [], window=window)
    before, now = rows_of(store), rows_of(after)
    for age in range(min(window, 4)):
        row = now[(5 - age) % window]
        assert int((row != 0).sum()) >= 40
        assert torch.equal(row[row != 0], before[(5 - age) % 4][row != 0])
    assert window == 2 or not now[[r for r in range(9) if (5 - r) % 9 > 3]].any()


def test_other_bits_and_blocks() -> None:
    """Full errors become codes and codes full errors; blocks of another size keep entries."""
    window, error = saved([130])
    dense = error.read(0, NUMEL, torch.float32)
    after, full = loaded(window, error, [200], quant_bits=32, block_size=128, density=1.0)
    assert torch.equal(full.read(0, NUMEL, torch.float32), dense)
    assert torch.equal(rows_of(after), rows_of(window))
    _, codes = loaded(after, full, [130])
    unit = max(float(top - low) for top, low in zip(codes.high, codes.low, strict=True)) / 15
    assert (codes.read(0, NUMEL, torch.float32) - dense).abs().max() <= 0.5 * unit + 1e-6


def test_gaps_are_refused() -> None:
    pieces = [
        (new_stores(layout, MicroHyperparameters(), torch.float32, "cpu"), layout)
        for layout in layouts([100])
    ]
    held = [(s[0], PADDING, x.numel - 2 * PADDING) for s, x in pieces]
    with pytest.raises(ValueError, match="100 of 500 elements are saved"):
        join_windows(NUMEL, held[:1])
    with pytest.raises(ValueError, match=r"\[0, 100\) are saved twice or not"):
        join_windows(NUMEL, held[1:])
    other = [(s[1], PADDING, x.numel - 2 * PADDING) for s, x in pieces]
    with pytest.raises(ValueError, match=r"saved twice or not"):
        join_errors(NUMEL, [*other, other[0]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes(data: st.DataObject) -> None:
    """Within half a unit, the ends exact, nothing outside takes part; NaN stays in its group."""
    width = 8 * data.draw(st.integers(1, 5))
    a = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    a *= 10.0 ** data.draw(st.integers(-20, 20))
    outside = torch.zeros_like(a, dtype=torch.bool)
    outside[:, : data.draw(st.integers(0, 7))] = True
    packed, low, high = quantize(a.masked_fill(outside, 0.0), 8, outside)
    assert torch.equal(pack(unpack(packed)), packed)
    assert not unpack(packed)[outside].any()
    read = dequantize(packed, low, high, 8, torch.float32)
    unit = ((high - low) / 15).repeat_interleave(8, dim=1)
    assert bool(((read - a).abs() <= 0.501 * unit)[~outside].all())
    a[1, -1] = torch.nan
    spoilt = dequantize(*quantize(a, 8), 8, torch.float32)
    assert spoilt.isnan().sum() == 8 and bool(spoilt[1, -8:].isnan().all())
    same = torch.full((1, 8), 0.3)
    assert torch.equal(dequantize(*quantize(same, 8), 8, torch.float32), same)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(-45, 37), st.integers(-30, 30), st.booleans())
@example(0, -44, -7, False)  # the unit is rounded down by much
def test_zero_is_a_code(seed: int, scale: int, shift: int, wide: bool) -> None:
    """What is 0 reads as 0, in any company; of equal elements too."""
    dtype = torch.float64 if wide else torch.float32
    a = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    a = (a + shift / 10) * 10.0**scale
    a[:, seed % 8 :: 8] = 0.0
    a[3] = 0.0
    read = dequantize(*quantize(a, 32), 32, dtype)
    assert not read[a == 0].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(-30, 30), st.integers(-30, 30), st.floats(0.0, 1.0))
def test_shrunk_ranges(seed: int, scale: int, shift: int, factor: float) -> None:
    """Codes read as a multiple of what they read as before, and what is 0 as 0."""
    a = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    a = (a + shift / 10) * 10.0**scale
    a[:2] = (a[:2] / a[:2].abs().max() * 7).round_() * 10.0**scale  # half units, codes in a tie
    a[3] = 0.0
    codes, low, high = quantize(a, 32)
    before = dequantize(codes, low, high, 32, torch.float32)
    after = dequantize(codes, *shrink(low, high, factor, torch.float32), 32, torch.float32)
    largest = torch.maximum(low.abs(), high.abs()).repeat_interleave(32, dim=1)
    assert bool(((after - factor * before).abs() <= 1e-5 * factor * largest + 1e-44).all())
    assert not after[before == 0].any()


def test_a_code_for_zero_costs_no_accuracy() -> None:
    """Against Algorithm 2 as printed: the same bound, u / 2, and no more error but for 2 %.

    Errors gather around 0: the heavier the tails of a group, the more it gains.
    """
    generator, group = torch.Generator().manual_seed(0), 128
    normal = torch.randn(4096, group, generator=generator, dtype=torch.float64)
    left = normal.masked_fill(normal.abs() > 2.5, 0.0)  # as by a window of the largest 1 %
    for a, most, least in (
        (normal, 1.02, 0.98),
        (left, 1.02, 0.98),
        (normal + 0.5, 1.02, 0.98),
        (normal.exp() - 1.0, 1.02, 0.95),
        (normal.pow(3), 0.55, 0.45),
    ):
        low, high = (x.float().double().unsqueeze(-1) for x in (a.amin(1), a.amax(1)))
        unit = (high - low) / 15
        printed = torch.floor((a - low) / unit + 0.5) * unit + low - a
        ours = dequantize(*quantize(a, group), group, torch.float64) - a
        assert (ours.abs() / unit).max() <= 0.5 + 1e-6
        assert least <= ours.square().mean() / printed.square().mean() <= most


@given(st.integers(0, 900), st.integers(1, 900), st.sampled_from([2, 8, 64, 128]))
def test_spans_cover_a_fragment(start: int, numel: int, block: int) -> None:
    """Each element once, in order; whole blocks at multiples of the block, parts in one block."""
    spans = cut(start, numel, 7, block)
    at = start
    for span in spans:
        assert (span.start, span.offset) == (at, 7 + at - start)
        at += span.numel
        if span.cols == block:
            assert span.start % block == 0
        else:
            assert span.rows == 1 and span.start // block == (at - 1) // block
        place = span.place(Grid(block, 2))
        assert place.base <= place.lead < place.base + place.width
        assert slots_of(span, 0.07) == -(-7 * span.cols // 100)
    assert at == start + numel


def test_payloads() -> None:
    """A store is what its payload says, and another version is refused."""
    for store in saved([130]):
        again = type(store).from_payload(store.to_payload())
        values = (s.read(0, NUMEL, torch.float32) for s in (store, again))
        assert torch.equal(*values)
        with pytest.raises(ValueError, match="format version 99; this release"):
            type(store).from_payload({**store.to_payload(), "version": 99})


@pytest.mark.parametrize("place", [-1, KNOBS["block_size"]])
def test_a_damaged_window_is_refused(place: int) -> None:
    """Before a step could write outside a block."""
    window, _ = saved([130])
    payload = window.to_payload()
    payload["indices"][1, 0] = place
    with pytest.raises(ValueError, match=rf"places .*{place}.* the checkpoint is damaged"):
        WindowStore.from_payload(payload)
