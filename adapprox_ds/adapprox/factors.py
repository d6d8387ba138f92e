# SPDX-License-Identifier: Apache-2.0
"""How a second moment is stored: factors of matrix blocks, and a dense remainder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.rank import RankPolicy, rank_in_use
from adapprox_ds.core import saved
from adapprox_ds.core.layout import Block, ShardLayout

#: The version of the serialised form. It is raised when its fields change meaning.
FORMAT_VERSION = 2

#: The name of the state in error messages.
_OWNER = "LowRankMoment"

#: The allowed dtypes of factors, and those of dense runs.
_FACTOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_DENSE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: What the factors approximate: the second moment V itself (the paper), or its root sqrt(V).
DOMAINS = ("variance", "std")


@dataclass(slots=True)
class Factors:
    """The second moment of a block, kept as Q U^T.

    Where several processes factor a matrix together, the block is this process's share, which may
    begin and end inside a row; U is that of the whole matrix, or some rows of it.

    Attributes:
        block: the block, which says where its rows lie in the flat tensor.
        q: Q, (rows, k), in fp32, fp64 or bf16.
        u: U, (cols, k), or the rows of it that are kept here, in the dtype of Q. The columns are in
            the order of their energy.
        rank: a real number, which becomes the rank of the next factorisation when it is rounded.
        error: the last known error ratio xi; NaN before the first one.
    """

    block: Block
    q: Tensor
    u: Tensor
    rank: float
    error: float = float("nan")

    def reconstruct(self, domain: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of V: [Q U^T]_+ or, in the domain "std", its square.

        The result is a new tensor, in fp32, or in fp64 if the factors are.

        Raises:
            RuntimeError: this process keeps only some rows of U.
        """
        if (kept := self.block.u_rows) is not None:
            raise RuntimeError(
                f"exp_avg_sq cannot be read here: with right_factor='sharded' this rank keeps rows "
                f"{kept[0]} to {kept[1]} of the {self.block.cols} of a matrix's right "
                "factor, and no read asks the others. Save a checkpoint and convert it (python -m "
                "adapprox_ds convert), or train with right_factor='replicated'"
            )
        wide = torch.promote_types(self.q.dtype, torch.float32)
        values = (self.q[first:last].to(wide) @ self.u.T.to(wide)).clamp_(min=0)
        return values.square_() if domain == "std" else values

    def change_rank(self, rank: int) -> None:
        """Make room for factors of another rank, whose values are then to be written."""
        if self.q.shape[1] != rank:
            self.q, self.u = (x.new_empty(len(x), rank) for x in (self.q, self.u))

    def read(self, begin: int, end: int, domain: str, out: Tensor) -> None:
        """Write elements [begin, end) of the flat tensor, all within the block, to ``out``."""
        origin, cols = self.block.offset - self.block.skip, self.block.cols
        first, last = (begin - origin) // cols, -(-(end - origin) // cols)
        rows = self.reconstruct(domain, first, last).view(-1)
        skip = begin - origin - first * cols
        out.copy_(rows[skip : skip + end - begin])


@dataclass(slots=True)
class PendingErrors:
    """Error ratios on their way from the device to the host, read when they are next needed.

    Attributes:
        values: the error ratios of all blocks, end to end.
        counts: the number of error ratios of each block.
        policy: the policy that computes the next ranks from them.
        step: the number of the step that measured them.
        ready: the event that is recorded after the copy; None where nothing is copied.
    """

    values: Tensor
    counts: list[int]
    policy: RankPolicy
    step: int
    ready: Any = None

    @classmethod
    def start(cls, errors: list[Tensor], policy: RankPolicy, step: int) -> PendingErrors:
        """Start the copy without waiting; ``errors`` has a 1-D tensor for each block."""
        values, counts = torch.cat(errors), [len(e) for e in errors]
        if values.device.type == "cpu":
            return cls(values, counts, policy, step)
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device.type)
        event.record()
        return cls(host, counts, policy, step, event)

    def wait(self) -> list[list[float]]:
        """Wait for the copy, and return the error ratios of each block."""
        if self.ready is not None:
            self.ready.synchronize()
        return [part.tolist() for part in self.values.split(self.counts)]


@dataclass(slots=True)
class FactorStore:
    """The second moment of one flat tensor, as it is stored.

    Attributes:
        numel: the length of the flat tensor, with its padding, which reads as 0.
        factors: the factors of the matrix blocks, in the order of their offsets.
        runs: (offset, numel) of each dense run, in the order in which they lie in ``dense``.
        dense: the dense runs, end to end; the second moment itself, whatever the domain is.
        domain: what the factors approximate, one of ``DOMAINS``.
        pending: the error ratios of the last step, if they have not set the ranks yet.
        written: (offset, values) of values that were written over blocks since the last step; the
            next step factors them.
        matched: the layout that the factors are known to fit, so that the next step does not
            compare them again; None for a new store.
    """

    numel: int
    factors: list[Factors]
    runs: tuple[tuple[int, int], ...]
    dense: Tensor
    domain: str = "variance"
    pending: PendingErrors | None = field(default=None)
    written: list[tuple[int, Tensor]] = field(default_factory=list)
    matched: ShardLayout | None = field(default=None, repr=False, compare=False)

    @classmethod
    def zeros(
        cls,
        numel: int,
        blocks: Sequence[Block],
        runs: Sequence[tuple[int, int]],
        rank: float,
        policy: RankPolicy,
        domain: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        factor_dtype: torch.dtype | None = None,
    ) -> FactorStore:
        """A second moment of 0, with factors of rank k_0 within each block's limits.

        Args:
            numel: the length of the flat tensor.
            blocks: the blocks.
            runs: (offset, numel) of each dense run.
            rank: k_0.
            policy: the limits of the rank.
            domain: one of ``DOMAINS``.
            dtype: the dtype of the dense runs.
            device: the device of all tensors.
            factor_dtype: the dtype of the factors; None for ``dtype``.
        """
        factor_dtype = factor_dtype or dtype
        factored = []
        for block in blocks:
            start = policy.clip(rank, block.rank_bound)
            k = rank_in_use(start)
            q = torch.zeros(block.rows, k, dtype=factor_dtype, device=device)
            u = torch.zeros(block.kept_u_rows, k, dtype=factor_dtype, device=device)
            factored.append(Factors(block, q, u, float(start)))
        size = sum(n for _, n in runs)
        dense = torch.zeros(size, dtype=dtype, device=device)
        return cls(numel, factored, tuple(runs), dense, domain)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.dense.device

    @property
    def allocated_bytes(self) -> int:
        """The bytes of its tensors."""
        tensors = [self.dense, *(t for b in self.factors for t in (b.q, b.u))]
        tensors += [values for _, values in self.written]
        return sum(t.numel() * t.element_size() for t in tensors)

    def settle(self) -> None:
        """Let the last step's error ratios set the ranks; waits for their copy to the host."""
        if self.pending is None:
            return
        policy, t, ratios = self.pending.policy, self.pending.step, self.pending.wait()
        self.pending = None
        for factors, errors in zip(self.factors, ratios, strict=True):
            factors.error = errors[-1]
            bound = factors.block.rank_bound
            factors.rank = policy.next_rank(factors.rank, errors, bound, t)

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the logical flat tensor, as a new dense 1-D tensor."""
        out = torch.zeros(end - begin, dtype=dtype, device=self.device)
        for factors in self.factors:
            lo, hi = max(factors.block.offset, begin), min(factors.block.end, end)
            if lo < hi:
                factors.read(lo, hi, self.domain, out[lo - begin : hi - begin])
                for offset, values in self.written:
                    a, b = max(lo, offset), min(hi, offset + len(values))
                    if a < b:
                        out[a - begin : b - begin].copy_(values[a - offset : b - offset])
        for lo, hi, piece in self._dense_between(begin, end):
            out[lo - begin : hi - begin].copy_(piece)
        return out

    def _dense_between(self, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield for each part of a dense run in [begin, end) its range and a view of it."""
        at = 0
        for offset, numel in self.runs:
            lo, hi = max(offset, begin), min(offset + numel, end)
            if lo < hi:
                yield lo, hi, self.dense[at + lo - offset : at + hi - offset]
            at += numel

    def write(self, begin: int, values: Tensor) -> None:
        """Replace the elements from ``begin`` on by a copy of ``values``, (n,).

        Values of blocks are kept dense, and are read from there, until the next step factors them.

        Raises:
            ValueError: a value is negative or not finite.
            RuntimeError: several processes factor a matrix together.
        """
        end = begin + len(values)
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(
                f"{_OWNER}: values to be written to exp_avg_sq include NaN, infinity or numbers "
                "below 0; allowed: finite numbers >= 0, as means of squares are"
            )
        values = values.to(self.device, self.dense.dtype, copy=True)
        if any(f.block.offset < end and begin < f.block.end for f in self.factors):
            if any(f.block.matrix_rows is not None for f in self.factors):
                raise RuntimeError(
                    "exp_avg_sq cannot be set here: with scope='matrix' ranks factor a matrix "
                    "together, and none of them can factor what it is given alone. Leave "
                    "exp_avg_sq of matrices out of the call, or train with scope='partition'"
                )
            self.settle()
            older = [(a, x) for a, x in self.written if a < begin or a + len(x) > end]
            self.written = [*older, (begin, values)]
        for lo, hi, piece in self._dense_between(begin, end):
            piece.copy_(values[lo - begin : hi - begin])

    def map(self, change: Callable[[Tensor], Tensor]) -> FactorStore:
        """A new store with ``change``, such as a move to a device, applied to each tensor."""
        self.settle()
        blocks = [replace(b, q=change(b.q), u=change(b.u)) for b in self.factors]
        store = FactorStore(self.numel, blocks, self.runs, change(self.dense), self.domain)
        store.written = [(offset, change(values)) for offset, values in self.written]
        return store

    def to_payload(self) -> dict[str, Any]:
        """The store as plain containers and tensors, loadable with ``weights_only=True``."""
        self.settle()
        return {
            "version": FORMAT_VERSION,
            "domain": self.domain,
            "numel": self.numel,
            "blocks": [
                (
                    *(f.block.offset, f.block.rows, f.block.cols),
                    *(f.q, f.u, float(f.rank), float(f.error)),
                    *(f.block.skip, f.block.missing, f.block.matrix_rows, f.block.u_rows),
                )
                for f in self.factors
            ],
            "runs": list(self.runs),
            "dense": self.dense,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> FactorStore:
        """The inverse of :meth:`to_payload`.

        Raises:
            ValueError: the payload has another format version, or a field that is not allowed or
                does not fit the others.
        """
        names = ("domain", "numel", "blocks", "runs", "dense")
        held = saved.fields(payload, _OWNER, FORMAT_VERSION, names)
        if held["domain"] not in DOMAINS:
            raise ValueError(f"{_OWNER}: domain is {held['domain']!r}; allowed: {DOMAINS}")
        numel = saved.integer(held["numel"], f"{_OWNER}: numel")
        blocks = saved.items(held["blocks"], f"{_OWNER}: blocks")
        blocks = [_saved_block(i, block) for i, block in enumerate(blocks)]
        runs = [
            saved.integers(run, f"{_OWNER}: run {i}", 2)
            for i, run in enumerate(saved.items(held["runs"], f"{_OWNER}: runs"))
        ]
        size = sum(n for _, n in runs)
        dense = saved.tensor(held["dense"], f"{_OWNER}: dense", (size,), _DENSE_DTYPES)
        ends = [(f.block.offset, f.block.end) for f in blocks] + [(a, a + n) for a, n in runs]
        last = 0
        for begin, end in sorted(ends):
            if begin < last or end < begin or end > numel:
                raise ValueError(
                    f"{_OWNER}: a block or run at [{begin}, {end}) overlaps its neighbour or "
                    f"leaves the tensor: allowed is [{last}, {numel})"
                )
            last = end
        made = cls(numel, blocks, tuple((a, n) for a, n in runs), dense, held["domain"])
        made.require_fit()
        return made

    def require_fit(self) -> None:
        """Raise unless the factors and the rank of each block fit its size.

        Raises:
            ValueError: they do not; the message has the block, what it has and what fits.
        """
        for i, f in enumerate(self.factors):
            what = f"{_OWNER}: {{}} of block {i}"
            k = max(1, saved.matrix_shape(f.q, what.format("q"))[1])
            f.q = saved.tensor(f.q, what.format("q"), (f.block.rows, k), _FACTOR_DTYPES)
            f.u = saved.tensor(f.u, what.format("u"), (f.block.kept_u_rows, k), (f.q.dtype,))
            saved.number(f.rank, what.format("rank"), 1.0, float(max(f.block.rank_bound, k + 1)))


def _saved_block(i: int, block: Any) -> Factors:
    """The factors of a saved block, once its offset and size are checked."""
    what = f"{_OWNER}: block {i}"
    offset, rows, cols, q, u, rank, error, *cut = saved.items(block, what, 11)
    offset, rows, cols = saved.integers((offset, rows, cols), f"{what}'s offset, rows and columns")
    skip, missing = saved.integers(cut[:2], f"{what}'s cut")
    matrix_rows, u_rows = cut[2:]
    if rows < 1 or cols < 1 or max(skip, missing) >= cols or skip + missing >= rows * cols:
        raise ValueError(
            f"{what} is {rows} x {cols} without {skip} first and {missing} last elements: the "
            "checkpoint is damaged; use another one"
        )
    if matrix_rows is not None:
        matrix_rows = saved.integer(matrix_rows, f"{what}'s matrix_rows", rows)
    if u_rows is not None:
        first, end = saved.integers(u_rows, f"{what}'s u_rows", 2)
        u_rows = (first, saved.integer(end, f"{what}'s u_rows", first, cols))
    if type(error) not in (int, float):
        raise ValueError(f"{what}'s error is {error!r}; allowed: a number, or NaN")
    return Factors(Block(offset, rows, cols, skip, missing, matrix_rows, u_rows), q, u, rank, error)
