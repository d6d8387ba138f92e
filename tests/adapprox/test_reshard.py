# SPDX-License-Identifier: Apache-2.0
"""Factors moved between row ranges, against dense fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds.adapprox.factors import DOMAINS, Factors, FactorStore
from adapprox_ds.adapprox.rank import RankPolicy
from adapprox_ds.adapprox.reshard import (
    LazyMatrix,
    RankTarget,
    dense_store,
    factor_tile,
    join,
    piece_of,
    reshard,
)
from adapprox_ds.core.layout import ParamFragment, ShardLayout, matrix_shape

FREE = 10_000


def target(domain: str = "variance", rank_max: int = FREE, initial: int = 4) -> RankTarget:
    return RankTarget(RankPolicy(1, rank_max, 1, 0.9, 1e-3), initial, domain)


def layouts(shape: tuple[int, ...], edges: list[int]) -> list[ShardLayout]:
    """One shard a rank; each with something before and after the fragment."""
    made = []
    for lo, hi in pairwise([0, *sorted(edges), math.prod(shape)]):
        span = ParamFragment("w", shape, lo, hi - lo, 3)
        made.append(ShardLayout.build([span], hi - lo + 5))
    return made


def fill(layout: ShardLayout, domain: str, rank: int, seed: int) -> FactorStore:
    """Positive factors of a rank, at most what a block saves memory with."""
    g = torch.Generator().manual_seed(seed)
    store = FactorStore.zeros(
        layout.numel,
        layout.blocks,
        [(r.offset, r.numel) for r in layout.runs],
        rank,
        RankPolicy(1, FREE, 1, 0.9, 1e-3),
        domain,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for b in store.factors:
        # Some entries of Q U^T are negative, so the clamp takes part.
        b.q = torch.rand(b.q.shape, generator=g) - 0.2
        b.u = torch.rand(b.u.shape, generator=g)
        b.error = 0.01 * seed
    store.dense = torch.rand(store.dense.shape, generator=g)
    return store


def dense_of(store: FactorStore, clamp: bool = True) -> Tensor:
    """The fragment's values in fp64, by definition; in the factors' domain without the clamp."""
    flat = torch.zeros(store.numel, dtype=torch.float64)
    for b in store.factors:
        a = b.q.double() @ b.u.double().T
        if clamp:
            a = a.clamp(min=0) ** (2 if store.domain == "std" else 1)
        flat[b.block.offset : b.block.end] = a.reshape(-1)
    at = 0
    for offset, numel in store.runs:
        values = store.dense[at : at + numel].double()
        flat[offset : offset + numel] = values if clamp or store.domain != "std" else values.sqrt()
        at += numel
    return flat


def save(
    shape: tuple[int, ...], edges: list[int], domain: str, rank: int
) -> tuple[FactorStore, Tensor, Tensor]:
    """What a converter makes of the ranks' stores; and V; and V (or its root) unclamped."""
    made = layouts(shape, edges)
    stores = [fill(layout, domain, rank, i + 1) for i, layout in enumerate(made)]
    fragments = [layout.fragments[0].fragment for layout in made]
    pieces = [piece_of(s, f) for s, f in zip(stores, fragments, strict=True)]
    whole = join(math.prod(shape), reversed(pieces), domain)
    parts = [(f.offset, f.offset + f.numel) for f in fragments]
    v, raw = (
        torch.cat([dense_of(s, c)[lo:hi] for s, (lo, hi) in zip(stores, parts, strict=True)])
        for c in (True, False)
    )
    return whole, v, raw


def check_new_partition(
    whole: FactorStore,
    v: Tensor,
    raw: Tensor,
    shape: tuple[int, ...],
    edges: list[int],
    t: RankTarget,
) -> int:
    """Every fragment of a new partition: exact, or truncated optimally at the rank limit.

    Returns:
        The number of truncated blocks.
    """
    truncated = 0
    for layout in layouts(shape, edges):
        part = layout.fragments[0]
        piece = reshard(whole, part, t)
        begin = part.fragment.start - part.fragment.offset
        for run, (offset, values) in zip(part.runs, piece.runs, strict=True):
            assert offset == run.offset
            torch.testing.assert_close(
                values.double(), v[run.start : run.start + run.numel], rtol=1e-6, atol=1e-6
            )
        assert [b.block for b in piece.factors] == [x for x in (part.block,) if x is not None]
        for b in piece.factors:
            block = b.block
            assert b.q.is_contiguous() and b.u.is_contiguous()
            rows = slice(begin + b.block.offset, begin + b.block.end)
            expected = v[rows].view(b.block.rows, b.block.cols)
            got = b.reconstruct(t.domain).double()
            error = float((got - expected).norm() / expected.norm())
            limit = min(t.policy.maximum, block.rank_bound)
            assert b.q.shape[1] <= limit
            assert b.rank <= limit
            energy = b.q.double().square().sum(0) * b.u.double().square().sum(0)
            if b.q.shape[1] > 1 and edges_differ(whole, begin, b):
                assert bool((energy.diff() <= 1e-6 * energy[0]).all())
            if error > 2e-6:
                truncated += 1
                assert b.q.shape[1] == limit
                a, e = raw[rows].view(b.block.rows, b.block.cols), expected
                root = e.sqrt() if t.domain == "std" else e
                best = max(float(torch.linalg.svdvals(m)[limit:].norm()) for m in (a, root))
                kept = b.q.double() @ b.u.double().T
                found = min(float((kept - m).norm()) for m in (a, root))
                assert found <= 1.001 * best + 1e-5 * float(root.norm())
                assert math.isnan(b.error) or b.error > 0
    return truncated


def edges_differ(whole: FactorStore, begin: int, b: Factors) -> bool:
    """Whether a block is none of the saved ones, whose columns stay as they are."""
    spans = {(s.block.offset, s.block.end) for s in whole.factors}
    first, end = b.block.offset + begin, b.block.end + begin
    inside = any(lo <= first and end <= hi for lo, hi in spans)
    return (first, end) not in spans and not inside


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(40, 30), (64, 24), (12, 50), (8, 6, 3, 3), (4, 16, 12), (300, 270)]),
    domain=st.sampled_from(DOMAINS),
    rank=st.integers(1, 4),
    rank_max=st.sampled_from([2, 5, FREE]),
    data=st.data(),
)
def test_any_partition_to_any_other(
    shape: tuple[int, ...], domain: str, rank: int, rank_max: int, data: st.DataObject
) -> None:
    """Exact wherever the rank limit allows it, optimal elsewhere; both domains."""
    edges = st.lists(st.integers(1, math.prod(shape) - 1), max_size=3, unique=True)
    old, new = data.draw(edges, "saved"), data.draw(edges, "loaded")
    whole, v, raw = save(shape, old, domain, rank)
    check_new_partition(whole, v, raw, shape, new, target(domain, rank_max))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_partition_to_the_bit(domain: str) -> None:
    """Columns, ranks and errors stay as the optimizer had them."""
    shape, edges = (40, 30), [395, 800]
    whole, _, _ = save(shape, edges, domain, 3)
    for layout, saved in zip(layouts(shape, edges), whole.factors, strict=True):
        b = reshard(whole, layout.fragments[0], target(domain)).factors[0]
        assert torch.equal(b.q, saved.q) and torch.equal(b.u, saved.u)
        assert (b.rank, b.error) == (saved.rank, saved.error)


@pytest.mark.parametrize("domain", DOMAINS)
def test_parts_take_rows_and_several_blocks_stack(domain: str) -> None:
    """A half keeps its rank; two blocks and the row cut between them make k1 + k2 + 1."""
    shape = (64, 48)
    whole, v, raw = save(shape, [], domain, 3)
    assert check_new_partition(whole, v, raw, shape, [20 * 48, 40 * 48], target(domain)) == 0
    halves = layouts(shape, [32 * 48])
    assert [reshard(whole, s.fragments[0], target(domain)).factors[0].q.shape for s in halves] == [
        (32, 3),
        (32, 3),
    ]
    whole, v, raw = save(shape, [30 * 48 + 7], domain, 3)
    assert check_new_partition(whole, v, raw, shape, [], target(domain)) == 0
    one = reshard(whole, layouts(shape, [])[0].fragments[0], target(domain)).factors[0]
    assert one.q.shape == (64, 7)
    assert one.rank == 3.0, "the largest of the blocks' rank moments"
    assert 0.01 <= one.error <= 0.02, "between the blocks' error ratios"


def test_truncation_adds_to_the_error_ratio() -> None:
    """The known error and that of the truncation add in squares."""
    shape = (64, 48)
    whole, v, raw = save(shape, [32 * 48], "variance", 4)
    b = reshard(whole, layouts(shape, [])[0].fragments[0], target(rank_max=5)).factors[0]
    lost = float(torch.linalg.svdvals(raw.view(shape))[5:].norm() / raw.norm())
    assert b.q.shape[1] == 5
    norms = [float(raw[half].norm()) for half in (slice(0, 1536), slice(1536, None))]
    before = ((norms[0] * 0.01) ** 2 + (norms[1] * 0.02) ** 2) / float(raw.norm()) ** 2
    assert b.error == pytest.approx(math.sqrt(before + lost**2), rel=1e-3)
    assert check_new_partition(whole, v, raw, shape, [], target(rank_max=5)) == 1


@pytest.mark.parametrize("saved", DOMAINS)
def test_another_domain_is_factored_anew(saved: str) -> None:
    """V of full rank 1 in both domains: nothing is lost but the clamp's share."""
    shape = (40, 30)
    whole, v, _ = save(shape, [600], saved, 1)
    for b in whole.factors:
        b.q.abs_()
    v = whole.read(0, 1200, torch.float64)
    other = next(d for d in DOMAINS if d != saved)
    for layout in layouts(shape, [600]):
        f = layout.fragments[0]
        b = reshard(whole, f, target(other)).factors[0]
        expected = v[f.fragment.start :][: f.fragment.numel].view(b.block.rows, b.block.cols)
        torch.testing.assert_close(b.reconstruct(other).double(), expected, rtol=2e-4, atol=1e-6)
        assert b.error < 1e-4


def test_a_dense_second_moment_gets_k0_columns() -> None:
    """AdamW's: factored at the initial rank, as well as an SVD does it."""
    v = torch.rand(40, 30, generator=torch.Generator().manual_seed(0))
    part = layouts((40, 30), [])[0].fragments[0]
    b = reshard(dense_store(v, "variance"), part, target(initial=4)).factors[0]
    assert b.q.shape == (40, 4)
    best = float(torch.linalg.svdvals(v.double())[4:].norm() / v.double().norm())
    assert b.error == pytest.approx(best, rel=1e-4)


def test_large_tiles_are_factored_nearly_optimally() -> None:
    """The randomised factorisation, on a spectrum that falls slowly; it leaves the RNG alone."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(400, 300, generator=g)
    state = torch.get_rng_state()
    q, u = factor_tile(LazyMatrix(dense_store(a, "variance"), 0, *a.shape, "variance"), 12)
    assert torch.equal(state, torch.get_rng_state())
    best = float(torch.linalg.svdvals(a)[12:].norm())
    assert float((a - q @ u.T).norm()) <= 1.01 * best


def test_gaps_and_foreign_layouts_are_refused() -> None:
    """A missing rank's rows, rows saved twice, and blocks over a fragment's edge."""
    made = layouts((40, 30), [600])
    stores = [fill(layout, "variance", 2, i) for i, layout in enumerate(made)]
    pieces = [piece_of(s, m.fragments[0].fragment) for s, m in zip(stores, made, strict=True)]
    with pytest.raises(ValueError, match="600 of 1200 elements are saved"):
        join(1200, pieces[:1], "variance")
    with pytest.raises(ValueError, match="saved twice or not"):
        join(1200, [*pieces, pieces[1]], "variance")
    with pytest.raises(ValueError, match="saved twice or not"):
        join(1200, pieces[1:], "variance")
    wrong = ParamFragment("w", (40, 30), 0, 570, 3)
    with pytest.raises(ValueError, match="reach over the edge"):
        piece_of(stores[0], wrong)
    wrong = ParamFragment("w", (40, 30), 0, 602, 3)
    with pytest.raises(ValueError, match="600 of the 602"):
        piece_of(stores[0], wrong)


def test_shapes_used_here_are_viewed_as_assumed() -> None:
    """Else a case above tests less than it says."""
    assert matrix_shape((8, 6, 3, 3)) == (8, 54) or matrix_shape((8, 6, 3, 3)) == (48, 9)
