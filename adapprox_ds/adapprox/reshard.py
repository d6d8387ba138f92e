# SPDX-License-Identifier: Apache-2.0
"""Computes the factors of a new partition's blocks from those of the partition that was saved.

A parameter's second moment was saved as blocks of rows, with factors, and dense runs, which are cut
rows and vectors. The new partition cuts the rows elsewhere:

* A part of a saved block has its rows of Q, and the same U: this is exact.
* Several blocks are stacked, Q = blkdiag(Q1, Q2) and U = [U1 U2], of rank k1 + k2; a dense row
  joins the stack as a unit vector times that row, of rank 1: this is exact, too.
* A stack of a rank above the new block's limit is truncated optimally, by QR decompositions of its
  parts and an SVD of the small core.
* Where the stack would be larger than the block itself, or the saved factors approximate another
  domain, the block is factored anew, from a few dense rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors, FactorStore
from adapprox_ds.adapprox.rank import RankPolicy, rank_in_use
from adapprox_ds.adapprox.srsi import owned
from adapprox_ds.core.layout import Block, FragmentLayout, ParamFragment

#: Settings of the randomised SVD of a tile, whose error is far below that of the truncation.
_OVERSAMPLING, _ITERATIONS = 10, 4
#: A tile with at most this many rows, or columns, is factored by an exact SVD.
_EXACT_SIZE = 256
#: The number of elements of a tile that are in memory at a time.
_STRIP = 1 << 20


@dataclass(frozen=True, slots=True)
class RankTarget:
    """What the factors of new blocks have to be like.

    Attributes:
        policy: the group's rank limits.
        initial: k_0, the rank of a block for which no factors were saved.
        domain: what the factors are to approximate, one of ``factors.DOMAINS``.
    """

    policy: RankPolicy
    initial: int
    domain: str

    def limit(self, bound: int) -> int:
        """The largest rank of a block whose factors save memory up to the rank ``bound``."""
        return max(1, int(self.policy.clip(float(self.policy.maximum), bound)))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one parameter's second moment.

    Attributes:
        factors: the factors of its blocks, whose ``offset`` is an index in the flattened parameter.
        runs: (index of the first element, 1-D values) of each dense run.
    """

    factors: tuple[Factors, ...]
    runs: tuple[tuple[int, Tensor], ...]


def piece_of(store: FactorStore, fragment: ParamFragment) -> Piece:
    """The part of a shard's second moment that belongs to ``fragment``; shares the factors.

    Raises:
        ValueError: a block or run crosses an edge of the fragment: it was saved with another
            layout.
    """
    lo, hi = fragment.offset, fragment.offset + fragment.numel
    shift = fragment.start - lo
    factors, runs, covered, at = [], [], 0, 0
    for f in store.factors:
        b = f.block
        if b.offset < hi and b.end > lo:
            _require_inside(b.offset, b.end, lo, hi, fragment)
            factors.append(replace(f, block=replace(b, offset=b.offset + shift)))
            covered += b.numel
    for offset, numel in store.runs:
        if offset < hi and offset + numel > lo:
            _require_inside(offset, offset + numel, lo, hi, fragment)
            runs.append((offset + shift, store.dense[at : at + numel]))
            covered += numel
        at += numel
    if covered != fragment.numel:
        raise ValueError(
            f"the second moment holds {covered} of the {fragment.numel} elements of "
            f"{fragment.name!r} in this shard"
        )
    return Piece(tuple(factors), tuple(runs))


def _require_inside(begin: int, end: int, lo: int, hi: int, fragment: ParamFragment) -> None:
    if begin < lo or end > hi:
        raise ValueError(
            f"elements [{begin}, {end}) of the second moment reach over the edge of "
            f"{fragment.name!r} at [{lo}, {hi}): it was saved with another layout"
        )


def join(numel: int, pieces: Iterable[Piece], domain: str) -> FactorStore:
    """Join the pieces of all processes to the second moment of a parameter; shares the factors.

    Args:
        numel: the length of the flattened parameter.
        pieces: the pieces, in any order.
        domain: what all their factors approximate.

    Raises:
        ValueError: the pieces leave a gap or overlap, or are shares of different factorisations.
    """
    pieces = list(pieces)
    factors = sorted((f for p in pieces for f in p.factors), key=lambda f: f.block.offset)
    if factors and factors[0].block.matrix_rows is not None:
        return FactorStore(numel, [_join_shares(numel, factors)], (), _no_run(factors), domain)
    runs = sorted((r for p in pieces for r in p.runs), key=lambda r: r[0])
    spans = [(f.block.offset, f.block.end) for f in factors] + [(a, a + v.numel()) for a, v in runs]
    end = 0
    for lo, hi in sorted(spans):
        if lo != end:
            raise ValueError(f"elements [{min(lo, end)}, {max(lo, end)}) are saved twice or not")
        end = hi
    if end != numel:
        raise ValueError(f"{end} of {numel} elements are saved")
    dense = torch.cat([v for _, v in runs] or [_no_run(factors)])
    where = tuple((a, v.numel()) for a, v in runs)
    return FactorStore(numel, factors, where, dense, domain)


def _join_shares(numel: int, shares: Sequence[Factors]) -> Factors:
    """Join the shares of a matrix that processes factored together (``scope="matrix"``).

    Raises:
        ValueError: the shares leave a gap or overlap, or their U differ.
    """
    first, end = shares[0], 0
    for share in shares:
        at = share.block.offset
        if at != end:
            raise ValueError(f"elements at {min(end, at)} are saved twice or not")
        alike = share.u.shape[1] == first.u.shape[1] and share.rank == first.rank
        whole = share.block.u_rows is None
        if not alike or (whole and not torch.equal(share.u, first.u)):
            raise ValueError("the ranks saved different factors of one matrix: saves are mixed")
        end = share.block.end
    if end != numel:
        raise ValueError(f"{end} of {numel} elements are saved")
    # Processes that share a row have the same row of Q; it is taken from the first one.
    q = torch.cat([share.q[int(share.block.skip > 0) :] for share in shares])
    # The processes keep the rows of U in the order of their elements.
    u = first.u if first.block.u_rows is None else torch.cat([share.u for share in shares])
    return Factors(Block(0, len(q), first.block.cols), q, u, first.rank, first.error)


def _no_run(factors: Sequence[Factors]) -> Tensor:
    # In the dtype in which factors are read, as rows that the new partition cuts become dense.
    dtype = torch.promote_types(factors[0].q.dtype, torch.float32) if factors else torch.float32
    return torch.empty(0, dtype=dtype, device="cpu")


def dense_store(values: Tensor, domain: str) -> FactorStore:
    """A dense second moment as a store without factors; shares the values."""
    flat = values.reshape(-1)
    return FactorStore(flat.numel(), [], ((0, flat.numel()),), flat, domain)


def reshard(whole: FactorStore, part: FragmentLayout, target: RankTarget) -> Piece:
    """The part of a parameter's second moment that belongs to a fragment of a new partition.

    Args:
        whole: the parameter's second moment, whose offsets are indices in the flattened parameter.
        part: the fragment, with its block and its runs.
        target: the limits of the rank, and the domain.

    Returns:
        Factors and runs in the order of ``part``'s, with offsets in the flat tensor; new tensors.
    """
    factors = () if part.block is None else (_block(whole, part.block, target),)
    runs = tuple(
        (run.offset, whole.read(run.start, run.start + run.numel, whole.dense.dtype))
        for run in part.runs
    )
    return Piece(factors, runs)


@dataclass(slots=True)
class _Strip:
    """Consecutive rows of a target block, from row ``first`` on, with factors of their own."""

    first: int
    q: Tensor
    u: Tensor

    @property
    def energy(self) -> float:
        """The squared Frobenius norm of Q U^T."""
        q, u = self.q.double(), self.u.double()
        return float(((q.T @ q) * (u.T @ u)).sum().clamp_(min=0))


def _block(whole: FactorStore, block: Block, target: RankTarget) -> Factors:
    """The factors of one target block; new tensors."""
    if block.matrix_rows is None:
        made = _factors(whole, block, target)
        return replace(made, q=made.q.clone(), u=made.u.clone())
    # Every process computes the same factors of the whole matrix, and keeps its rows of them.
    matrix = Block(0, block.matrix_rows, block.cols, name=block.name)
    made = _factors(whole, matrix, target)
    q = made.q[block.first_row : block.first_row + block.rows].clone()
    u = made.u[slice(*(block.u_rows or (None,)))].clone()
    return Factors(block, q, u, made.rank, made.error)


def _factors(whole: FactorStore, block: Block, target: RankTarget) -> Factors:
    """The factors of one target block; the saved tensors themselves where they already fit."""
    rows, cols = block.rows, block.cols
    begin = block.first_row * cols
    end = begin + block.numel
    sources = [f for f in whole.factors if f.block.offset < end and f.block.end > begin]
    rank = max((b.rank for b in sources), default=float(target.initial))
    made = Factors(
        block,
        q=torch.empty(0, dtype=torch.float32, device="cpu"),
        u=torch.empty(0, dtype=torch.float32, device="cpu"),
        rank=float(target.policy.clip(rank, block.rank_bound)),
        error=math.nan,
    )
    limit = target.limit(block.rank_bound)
    of = [f.block for f in sources]
    own = (begin, rows, cols)
    same = [f for f in sources if (f.block.offset, f.block.rows, f.block.cols) == own]
    if same and whole.domain == target.domain and same[0].q.shape[1] <= limit:
        made.q, made.u, made.error = same[0].q, same[0].u, same[0].error
        return made
    aligned = all(b.cols == cols and b.offset % cols == 0 for b in of)
    spans = [_rows_of(b, begin, rows, cols) for b in of]
    stacked = sum(b.q.shape[1] for b in sources) + rows - sum(hi - lo for lo, hi in spans)
    if whole.domain != target.domain or not aligned or stacked >= min(rows, cols):
        exact = sources and whole.domain == target.domain
        columns = limit if exact else min(limit, rank_in_use(made.rank))
        return _from_tile(whole, begin, made, columns, target.domain)
    strips = []
    for b, (lo, hi) in zip(sources, spans, strict=True):
        skip = begin // cols + lo - b.block.offset // cols
        strips.append(_Strip(lo, b.q[skip : skip + hi - lo], b.u))
    before = _inherited_error(strips, [b.error for b in sources])
    strips += _dense_strips(whole, begin, rows, cols, spans)
    strips.sort(key=lambda strip: strip.first)
    if stacked <= limit:
        made.q, made.u = _by_energy(*_stack(strips, rows))
        made.error = before
    else:
        made.q, made.u, lost = _truncate(strips, rows, limit)
        made.error = math.hypot(before, lost)
    return made


def _rows_of(b: Block, begin: int, rows: int, cols: int) -> tuple[int, int]:
    """[first, end) of the rows of the target block that a saved block contains."""
    first = (b.offset - begin) // cols
    return max(first, 0), min(first + b.rows, rows)


def _dense_strips(
    whole: FactorStore, begin: int, rows: int, cols: int, spans: Sequence[tuple[int, int]]
) -> list[_Strip]:
    """The target block's rows that no saved block contains: an identity times these rows."""
    strips, at = [], 0
    for lo, hi in [*sorted(spans), (rows, rows)]:
        if at < lo:
            values = whole.read(begin + at * cols, begin + lo * cols, whole.dense.dtype)
            if whole.domain == "std":
                values.sqrt_()
            u = values.view(lo - at, cols).T
            strips.append(_Strip(at, torch.eye(lo - at, dtype=u.dtype, device=u.device), u))
        at = max(at, hi)
    return strips


def _inherited_error(strips: Sequence[_Strip], errors: Sequence[float]) -> float:
    """The error ratio of a stack, from those of its blocks; NaN where one is not known."""
    energies = [strip.energy for strip in strips]
    if len(errors) == 1 or not sum(energies):
        return errors[0] if errors else 0.0
    pairs = zip(energies, errors, strict=True)
    return math.sqrt(sum(e * x * x for e, x in pairs) / sum(energies))


def _stack(strips: Sequence[_Strip], rows: int) -> tuple[Tensor, Tensor]:
    """The stack's Q, (rows, sum of k), block-diagonal, and its U, (cols, sum of k)."""
    u = torch.cat([strip.u for strip in strips], dim=1)
    q = u.new_zeros(rows, u.shape[1])
    column = 0
    for strip in strips:
        m, k = strip.q.shape
        q[strip.first : strip.first + m, column : column + k] = strip.q
        column += k
    return q, u


def _by_energy(q: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with their columns in the order of their energy, largest first; new tensors."""
    energy = q.double().square().sum(0) * u.double().square().sum(0)
    order = energy.argsort(descending=True, stable=True)
    return q[:, order].contiguous(), u[:, order].contiguous()


def _truncate(strips: Sequence[_Strip], rows: int, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a stack at the given rank (Eckart and Young).

    Returns:
        Q (rows, rank) with orthonormal columns, U (cols, rank), and the error ratio.
    """
    dtype = strips[0].q.dtype
    split = [(strip.first, *torch.linalg.qr(strip.q.double())) for strip in strips]
    u_basis, u_core = torch.linalg.qr(torch.cat([s.u for s in strips], dim=1).double())
    core = torch.block_diag(*(r for _, _, r in split)) @ u_core.T
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    total = float(values.square().sum())
    lost = math.sqrt(float(values[rank:].square().sum()) / total) if total else 0.0
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    q = left.new_zeros(rows, left.shape[1])
    column = 0
    for first, basis, _ in split:
        m, k = basis.shape
        q[first : first + m] += basis @ left[column : column + k]
        column += k
    return q.to(dtype), (u_basis @ (right.T * values)).to(dtype), lost


def _from_tile(whole: FactorStore, begin: int, made: Factors, rank: int, domain: str) -> Factors:
    """Factor a target block anew, from its dense rows."""
    tile = LazyMatrix(whole, begin, made.block.rows, made.block.cols, domain)
    made.q, made.u = factor_tile(tile, rank)
    norm = residual = 0.0
    for rows, values in tile.strips():
        norm += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        values.addmm_(made.q[rows], made.u.T, alpha=-1)
        residual += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    made.error = math.sqrt(residual / norm) if norm else 0.0
    return made


@dataclass(frozen=True, slots=True)
class LazyMatrix:
    """A block as a matrix of which only some rows are in memory at a time.

    Attributes:
        whole: the parameter's second moment, whose offsets are indices in the flattened parameter.
        begin: the index in the flattened parameter of the block's first element.
        rows: the number of rows.
        cols: the number of columns.
        domain: what is to be factored, one of ``factors.DOMAINS``.
    """

    whole: FactorStore
    begin: int
    rows: int
    cols: int
    domain: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which its rows are computed."""
        return torch.promote_types(self.whole.dense.dtype, torch.float32)

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive rows: their indices, and their values as a new tensor."""
        step = max(1, _STRIP // self.cols)
        for lo in range(0, self.rows, step):
            hi = min(lo + step, self.rows)
            ends = self.begin + lo * self.cols, self.begin + hi * self.cols
            values = self.whole.read(*ends, self.dtype).view(hi - lo, self.cols)
            yield slice(lo, hi), values.sqrt_() if self.domain == "std" else values

    def __matmul__(self, u: Tensor) -> Tensor:
        """The product of the matrix and ``u``, (cols, k)."""
        return torch.cat([values @ u for _, values in self.strips()])

    def transposed_times(self, q: Tensor) -> Tensor:
        """The product of the transposed matrix and ``q``, (rows, k)."""
        product = q.new_zeros(self.cols, q.shape[1])
        for rows, values in self.strips():
            product.addmm_(values.T, q[rows])
        return product


def factor_tile(a: LazyMatrix, rank: int) -> tuple[Tensor, Tensor]:
    """The dominant singular directions of a matrix (m, n), in the order of their energy.

    The global random state is not used.

    Returns:
        Q (m, k) with orthonormal columns and U (n, k), k = min(rank, m, n).
    """
    if min(a.rows, a.cols) <= _EXACT_SIZE and a.rows * a.cols <= _STRIP:
        values = torch.cat([values for _, values in a.strips()])
        left, values, right = torch.linalg.svd(values, full_matrices=False)
    else:
        width = min(rank + _OVERSAMPLING, a.rows, a.cols)
        generator = torch.Generator("cpu").manual_seed(0)
        size = (a.cols, width)
        u = torch.randn(*size, generator=generator, dtype=a.dtype, device="cpu")
        for _ in range(_ITERATIONS):
            q, _ = torch.linalg.qr(a @ u)
            u, _ = torch.linalg.qr(a.transposed_times(q))
        basis, _ = torch.linalg.qr(a @ u)
        small = a.transposed_times(basis).T
        small, values, right = torch.linalg.svd(small, full_matrices=False)
        left = basis @ small
    return owned(left[:, :rank]), owned(right[:rank].T * values[:rank])
