# SPDX-License-Identifier: Apache-2.0
"""Moves windows and errors to another partition of a parameter into fragments.

Blocks and groups are counted from the beginning of the parameter, so most of them are the same in
any partition:

* A block that is whole in both partitions keeps its entries, to the bit.
* If the new partition cuts a block, each part keeps the entries that lie in it. If it joins parts,
  the block keeps the entries of all parts. Where there are more entries than slots, the largest
  are kept.
* A quantisation group whose elements were all in one saved group keeps its codes, minimum and
  maximum, to the bit. One whose elements were in several saved groups is quantised anew, which adds
  an error of at most half a unit of its range.

A window of another length keeps the latest gradients. An error of other bits or groups is quantised
anew where it has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.grid import Span
from adapprox_ds.micro_adam.quantize import pack, unpack
from adapprox_ds.micro_adam.window import WindowStore

#: The store of a shard, and the parameter's fragment in it: its offset in the shard, and its numel.
Held = tuple[WindowStore, int, int]
HeldError = tuple[ErrorStore, int, int]


def join_windows(numel: int, held: Iterable[Held]) -> WindowStore:
    """Join the windows of a parameter's fragments.

    Args:
        numel: the number of elements of the parameter.
        held: the window of each shard with a fragment of the parameter, and the fragment.

    Returns:
        A window of the whole parameter, whose offsets are indices in the flattened parameter.

    Raises:
        ValueError: the fragments leave a gap or overlap, or the settings or steps differ.
    """
    parts = [(s, i) for s, a, n in held for i in _within(s.spans, a, n)]
    parts.sort(key=lambda part: part[0].spans[part[1]].start)
    spans = _joined([s.spans[i] for s, i in parts], numel)
    one = parts[0][0]
    if len({(s.grid, s.window, s.betas, s.step) for s, _ in parts}) != 1:
        raise ValueError("the ranks hold windows of different settings or steps")
    pairs = [s.entries(i) for s, i in parts]
    indices, values = (
        torch.cat([t.flatten(1) for t in ts], dim=1) for ts in zip(*pairs, strict=True)
    )
    slots = tuple(s.slots[i] for s, i in parts)
    return WindowStore(numel, one.grid, spans, slots, indices, values, one.betas, one.step)


def join_errors(numel: int, held: Iterable[HeldError]) -> ErrorStore:
    """Join the errors of a parameter's fragments; see :func:`join_windows`."""
    parts = [(s, i) for s, a, n in held for i in _within(s.spans, a, n)]
    parts.sort(key=lambda part: part[0].spans[part[1]].start)
    spans = _joined([s.spans[i] for s, i in parts], numel)
    one = parts[0][0]
    if len({(s.grid, s.bits) for s, _ in parts}) != 1:
        raise ValueError("the ranks hold errors of different settings")
    rows = [s.rows(i) for s, i in parts]
    tensors = (
        torch.cat([t.flatten() for t in ts])
        for ts in zip(*((r.codes, r.low, r.high) for r in rows), strict=True)
    )
    return ErrorStore(numel, one.grid, spans, one.bits, *tensors)


def fill_window(whole: WindowStore, target: WindowStore, offset: int, numel: int) -> None:
    """Write the entries of a parameter to the empty window of a shard.

    Args:
        whole: the window of the whole parameter, from :func:`join_windows`.
        target: the window of the shard, which also gets the number of steps.
        offset: the index in the shard of the first element of the parameter's fragment.
        numel: the number of elements of the fragment.
    """
    target.step, t = whole.step, whole.step
    for i in _within(target.spans, offset, numel):
        span = target.spans[i]
        places, values = _entries(whole, span.start, span.start + span.numel)
        for age in range(min(whole.window, target.window, t)):
            row = (t - 1 - age) % whole.window
            _place(target, i, (t - 1 - age) % target.window, places[row], values[row])


def _entries(whole: WindowStore, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """The entries of the blocks that overlap elements [lo, hi) of a parameter.

    Returns:
        The indices in the flattened parameter, int64, and the values, both (window, entries).
    """
    block = whole.grid.block
    places = [torch.empty(whole.window, 0, dtype=torch.int64, device=whole.device)]
    values = [whole.values[:, :0]]
    for i, span in enumerate(whole.spans):
        first = max(0, (lo - span.start) // span.cols)
        last = min(span.rows, -(-(hi - span.start) // span.cols))
        if first < last:
            indices, entries = (x[:, first:last] for x in whole.entries(i))
            begin = (span.start // block + torch.arange(first, last, device=whole.device)) * block
            places.append((indices.to(torch.int64) + begin[:, None]).flatten(1))
            values.append(entries.flatten(1))
    return torch.cat(places, dim=1), torch.cat(values, dim=1)


def _place(target: WindowStore, i: int, row: int, places: Tensor, values: Tensor) -> None:
    """Write the entries of one step to a span; if a block has too many, only the largest of it.

    Args:
        target: the window of the shard.
        i: the index of the span.
        row: the row of the ring.
        places: the indices in the flattened parameter, (entries,) int64. Entries outside the span
            are left out.
        values: the values, (entries,).
    """
    span, slots = target.spans[i], target.slots[i]
    inside = (places >= span.start) & (places < span.start + span.numel) & (values != 0)
    places, values = places[inside], values[inside]
    order = values.abs().argsort(descending=True, stable=True)
    block = (places[order] - span.start) // span.cols
    by_block = block.argsort(stable=True)
    order, block = order[by_block], block[by_block]
    first = torch.searchsorted(block, block)
    slot = torch.arange(len(block), device=block.device) - first
    fits = slot < slots
    order, block, slot = order[fits], block[fits], slot[fits]
    indices, entries = target.entries(i)
    indices[row, block, slot] = (
        (places[order] % target.grid.block).to(torch.int16).to(indices.device)
    )
    entries[row, block, slot] = values[order].to(entries.device)


def fill_error(whole: ErrorStore, target: ErrorStore, offset: int, numel: int) -> None:
    """Write the error of a parameter to that of a shard.

    Args:
        whole: the error of the whole parameter, from :func:`join_errors`.
        target: the error of the shard.
        offset: the index in the shard of the first element of the parameter's fragment.
        numel: the number of elements of the fragment.
    """
    exact = whole.bits == target.bits == 4
    for i in _within(target.spans, offset, numel):
        span = target.spans[i]
        wide = torch.promote_types(target.codes.dtype, torch.float32)
        target.write_span(i, whole.read(span.start, span.start + span.numel, wide))
        if exact:
            _keep_groups(whole, target, i)


def _keep_groups(whole: ErrorStore, target: ErrorStore, i: int) -> None:
    """Copy the codes, minimum and maximum of each group of a span that lies in one saved group.

    Args:
        whole: the error of the whole parameter.
        target: the error of the shard.
        i: the index of the span in the shard.
    """
    span, place, grid = target.spans[i], target.spans[i].place(target.grid), target.grid
    lo, hi = span.start, span.start + span.numel
    begins, ends, low, high, codes = _groups(whole, lo, hi)
    held = target.rows(i)
    first = (
        span.start // grid.block + torch.arange(span.rows, device=whole.device)[:, None]
    ) * grid.block
    begin = first + place.base + grid.group * torch.arange(place.groups, device=whole.device)
    end = (begin + grid.group).clamp(max=first + place.lead + span.cols)
    begin = begin.clamp(min=first + place.lead)
    source = torch.searchsorted(begins, begin, right=True) - 1
    same = ends[source] >= end
    for mine, theirs in ((held.low, low), (held.high, high)):
        mine.copy_(torch.where(same, theirs[source], mine.cpu()))
    bytes_ = slice(*place.code_bytes(span.cols))
    inside = slice(place.left, place.left + span.cols)
    anew = held.codes.new_zeros(span.rows, place.width // 2)
    anew[:, bytes_] = held.codes
    cells = unpack(anew).cpu()
    taken = same.repeat_interleave(grid.group, dim=1)
    cells[:, inside] = torch.where(taken[:, inside], codes.view(span.rows, -1), cells[:, inside])
    held.codes.copy_(pack(cells)[:, bytes_])


def _groups(whole: ErrorStore, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The saved groups that overlap elements [lo, hi) of a parameter.

    Returns:
        The index of each group's first element, one past the index of its last, its minimum and its
        maximum, each (groups,); and the codes of the elements [lo, hi), uint8.
    """
    grid, found = whole.grid, []
    for i, span in enumerate(whole.spans):
        first = max(0, (lo - span.start) // span.cols)
        last = min(span.rows, -(-(hi - span.start) // span.cols))
        if first >= last:
            continue
        place, held = span.place(grid), whole.rows(i)[first:last]
        block = (
            span.start // grid.block + torch.arange(first, last, device=whole.device)[:, None]
        ) * grid.block
        begin = block + place.base + grid.group * torch.arange(place.groups, device=whole.device)
        end = (begin + grid.group).clamp(max=block + place.lead + span.cols)
        begin = begin.clamp(min=block + place.lead)
        frame = held.codes.new_zeros(last - first, place.width // 2)
        frame[:, slice(*place.code_bytes(span.cols))] = held.codes
        codes = unpack(frame)[:, place.left : place.left + span.cols].flatten()
        at = span.start + first * span.cols
        codes = codes[max(lo - at, 0) : hi - at]
        found.append(
            (begin.flatten(), end.flatten(), held.low.flatten(), held.high.flatten(), codes)
        )
    begins, ends, low, high, codes = (torch.cat(ts) for ts in zip(*found, strict=True))
    return begins, ends, low, high, codes


def _within(spans: Sequence[Span], offset: int, numel: int) -> Iterator[int]:
    """The indices of the spans that lie in the fragment at [offset, offset + numel)."""
    return (i for i, s in enumerate(spans) if offset <= s.offset < offset + numel)


def _joined(spans: Sequence[Span], numel: int) -> tuple[Span, ...]:
    """The spans of a whole parameter, with offsets that are indices in the flattened parameter.

    Args:
        spans: the spans in shards, in the order of their first elements in the parameter.
        numel: the number of elements of the parameter.

    Raises:
        ValueError: they leave a gap or overlap.
    """
    end = 0
    for span in spans:
        if span.start != end:
            lo, hi = min(span.start, end), max(span.start, end)
            raise ValueError(f"elements [{lo}, {hi}) are saved twice or not at all")
        end += span.numel
    if end != numel:
        raise ValueError(f"{end} of {numel} elements are saved")
    return tuple(Span(s.start, s.start, s.rows, s.cols) for s in spans)
