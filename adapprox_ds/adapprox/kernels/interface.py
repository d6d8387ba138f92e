# SPDX-License-Identifier: Apache-2.0
"""What goes into and comes out of the one pass over a matrix's elements; shared by all backends.

Of an (m, n) block with S = [Q U^T]_+ the kept root of the second moment, the pass forms::

    V = beta_2 max(S, floor)^2 + (1 - beta_2) G^2     R = sqrt(V)
    D = R * correction + eps                          X = G / D

tile by tile, updates the first moment M and the weights W::

    mean of gradients    M <- beta_1 M + (1 - beta_1) G             N = M or ahead(M, G)
                         W <- (1 - lr decay) W - lr first_correction [N / D] / clip
    mean of updates      M <- beta_1 M + (1 - beta_1) X / clip      N = M or ahead(M, X / clip)
                         W <- (1 - lr decay) W - lr first_correction N
    no first moment      W <- (1 - lr decay) W - lr X / clip

and takes both sketches of R for the next factors, R x and z^T R. V is never written out.

ahead(M, G) = beta_1 M + (1 - beta_1) G is Nesterov's, and [] holds to what gradients can make of
the quotient: where the factors have lost an entry, N / D would have no bound, unlike X, of which V
holds at least the square of G. To ascend is to do the same with -G. A pass that does not write
gives the sketches and the sum of X^2, from which the caller makes the clip.

Elements whose second moment is dense, V <- beta_2 V + (1 - beta_2) G^2, go through the same pass as
:class:`Runs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapprox_ds.adapprox.quantized import QuantizedMatrix

#: A rectangle's first moment, 2-D, in whatever form it is kept.
Mean = Tensor | QuantizedMatrix


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The numbers of a step that are known on the host.

    Attributes:
        beta1: decay of the first moment; 0 where none is kept.
        beta2: decay of the second moment.
        correction: what sqrt(V) is multiplied by at use, 1 / sqrt(1 - beta_2^t) for bias
            correction, else 1.
        first_correction: what N is multiplied by at use, for bias correction; 1 without.
        eps: added to the corrected root.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        ascend: whether to go along the gradient instead of against it.
        of_gradients: whether the first moment is the mean of gradients, else of updates.
        nesterov: whether N looks ahead.
        largest: the most that |N / D| can be where M is the mean of gradients.
        salt: of the random rounding of first moments (core/rounding.py).
        weight_salt: of the random rounding of 16-bit weights; None to round them to nearest.
    """

    beta1: float
    beta2: float
    correction: float
    first_correction: float
    eps: float
    lr: float
    weight_decay: float
    ascend: bool
    of_gradients: bool
    nesterov: bool
    largest: float = math.inf
    salt: int = 0
    weight_salt: int | None = None

    @property
    def sign(self) -> float:
        """What G counts as."""
        return -1.0 if self.ascend else 1.0

    @property
    def gain(self) -> float:
        """1 - beta_1, with the sign of G."""
        return self.sign * (1.0 - self.beta1)

    @property
    def ahead(self) -> tuple[float, float]:
        """Parts of M, and of G or X with the sign of G, that N consists of."""
        return (self.beta1, self.gain) if self.nesterov else (1.0, 0.0)

    def rate(self, has_first_moment: bool) -> float:
        """What is added to a weight for each part of N, or of G / D / clip where there is no M."""
        return -self.lr * (self.first_correction if has_first_moment else self.sign)


@dataclass(slots=True)
class Stack:
    """B blocks of one shape, (m, n), and what the pass needs and makes of them.

    Weights, first moments and gradients may lie anywhere on the device; all else has a leading B.
    ZeRO may cut a block's first and last row: ``skip`` elements of the first and ``missing`` of the
    last lie elsewhere.

    Attributes:
        rows: m, cut rows included.
        cols: n.
        skip: see above.
        missing: see above.
        w: B tensors of the elements held, 1-D and contiguous like those of ``g``; updated in place.
        m: B lists of the first moments of :attr:`tiles`, updated in place, or None.
        g: B gradients.
        first: the index in its matrix of each block's first element; seeds its random rounding.
        q: (B, m, k).
        u: (B, n, k).
        floor_rows: (B, m) or None: S is at least floor_rows[i] * floor_cols[j].
        floor_cols: (B, n) or None.
        col_squares: (B, n), what the columns of V count in ``row_energies``.
        x: (B, n, w) or None: the sketch's columns.
        z: (B, m, t) or None: the test sketch's columns. After the pass they are those that it
            multiplied by, which a backend may have rounded.
        clip: (B,), what updates are divided by, or None for 1.
        compensation: B tensors of int8 like those of ``w``, what rounding took from 16-bit weights;
            updated in place. None where nothing keeps it.
    """

    rows: int
    cols: int
    skip: int
    missing: int
    w: list[Tensor]
    m: list[list[Mean]] | None
    g: list[Tensor]
    first: list[int]
    q: Tensor
    u: Tensor
    floor_rows: Tensor | None
    floor_cols: Tensor | None
    col_squares: Tensor
    x: Tensor | None = None
    z: Tensor | None = None
    clip: Tensor | None = None
    compensation: list[Tensor] | None = None

    @property
    def tiles(self) -> Iterator[tuple[slice, slice, slice]]:
        """Rows, columns and elements of the rectangles that the elements form, in order."""
        return tiles_of(self.rows, self.cols, self.skip, self.missing)


@dataclass(slots=True)
class Runs:
    """R runs of elements whose second moment is dense.

    Attributes:
        w: R tensors, 1-D and contiguous like the others; updated in place.
        m: R first moments, (1, numel), updated in place, or None.
        g: R gradients.
        v: R second moments, updated in place by a pass that writes.
        first: the index in its parameter of each run's first element.
        clip: (R,), what updates are divided by, or None for 1.
        compensation: R tensors of int8; see :class:`Stack`.
    """

    w: list[Tensor]
    m: list[Mean] | None
    g: list[Tensor]
    v: list[Tensor]
    first: list[int]
    clip: Tensor | None = None
    compensation: list[Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """What the sketches of a stack are made of: the last factors of its blocks.

    Attributes:
        q: the local rows of Q, (B, m, k).
        u: all rows of U, (B, n, k).
        gram_q: Q^T Q over all rows of the matrix, (B, k, k), fp64.
        keys: for each block the keys of the random columns of its sketch, and of its test sketch
            (:func:`adapprox_ds.adapprox.sketch.sketch_key`).
        width: the number of columns of the sketch.
        tests: the number of columns of the test sketch.
        first: the global row index of the first local row.
        rows: the number of rows of the whole matrix.
        floor: the fraction of the mean that the floor is made of; 0 for no floor.
    """

    q: Tensor
    u: Tensor
    gram_q: Tensor
    keys: tuple[list[int], list[int]]
    width: int
    tests: int
    first: int
    rows: int
    floor: float


@dataclass(frozen=True, slots=True)
class Sketches:
    """What the last factors say of a stack before the pass; adapprox/algebra.py has the formulas.

    Attributes:
        x: the sketch with its weights applied, D_c X, (B, n, w).
        z: the test sketch with its weights applied, D_r Z, (B, m, t).
        row_squares: D_r^2, (B, m).
        col_squares: D_c^2, (B, n).
        row_scale: the number of rows of the matrix over the sum of (Q U^T)^2, (B, 1), fp64; 0 where
            the factors are zero.
        floor_rows: (B, m), or None without a floor.
        floor_cols: (B, n), or None without a floor.
    """

    x: Tensor
    z: Tensor
    row_squares: Tensor
    col_squares: Tensor
    row_scale: Tensor
    floor_rows: Tensor | None
    floor_cols: Tensor | None


@dataclass(slots=True)
class Found:
    """What a pass found of a stack, from which its new factors are made.

    Attributes:
        y: R D_c X, (B, m, w), complete in rows that ZeRO cut.
        z: D_r Z that the pass multiplied by, (B, m, t).
        p: Z^T D_r R, (B, t, n), over all rows of the matrix; of U's rows in parts, their columns.
        energies: the sums of V over the columns, weighted by D_c^2, for each local row, (B, m),
            fp64; of a cut row this process's part.
        shares: the same times ``row_scale``, complete in rows that ZeRO cut.
        row_squares: D_r^2 according to the last factors, (B, m).
        row_scale: see :class:`Sketches`.
        col_squares: D_c^2 of the columns of ``p``, (B, n).
        first: the first local row that counts in sums over the processes.
    """

    y: Tensor
    z: Tensor
    p: Tensor
    energies: Tensor
    shares: Tensor
    row_squares: Tensor
    row_scale: Tensor
    col_squares: Tensor
    first: int


@dataclass(slots=True)
class Solved:
    """What the new factors of a stack are made of, and where they go.

    Attributes:
        y: see :class:`Found`.
        p: see :class:`Found`.
        sums: G, H and ||T||_F^2 of algebra.py over the whole matrix, end to end, (B, w^2 + t w + 1)
            or more, fp64.
        s: S of algebra.py over the whole matrix, (B, t, t), fp64.
        rank: the rank k of the new factors.
        q: for each block the tensor, (m, k), that the new Q is written to.
        u: for each block the tensor, (n, k), that the new U is written to.
        first: in random rounding, the index of the first row of Q, and that of the first row of U,
            which is counted behind those of Q.
        salt: of random rounding (core/rounding.py).
    """

    y: Tensor
    p: Tensor
    sums: Tensor
    s: Tensor
    rank: int
    q: list[Tensor]
    u: list[Tensor]
    first: tuple[int, int]
    salt: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The rank, and the numbers of columns of both sketches."""
        return self.rank, self.y.shape[2], self.p.shape[1]


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a pass makes of a stack.

    Attributes:
        y: R x, (B, m, w).
        p: z^T R, (B, t, n).
        row_energies: V times col_squares, (B, m), fp64.
        squares: the sums of X^2, (B,), fp64; 0 after a pass that writes.
    """

    y: Tensor
    p: Tensor
    row_energies: Tensor
    squares: Tensor


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass makes.

    Attributes:
        stacks: of each stack.
        squares: the sums of X^2 of the runs, (R,), fp64; 0 after a pass that writes.
    """

    stacks: list[Reduced]
    squares: Tensor


def tiles_of(rows: int, cols: int, skip: int, missing: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a block into its left partial row, its whole rows and its right partial row.

    Yields:
        The rows, the columns and the elements of each that there is.
    """
    total, at = rows * cols - skip - missing, 0
    if rows == 1:
        yield slice(0, 1), slice(skip, cols - missing), slice(0, total)
        return
    first, last = int(skip > 0), rows - int(missing > 0)
    if first:
        at = cols - skip
        yield slice(0, 1), slice(skip, cols), slice(0, at)
    if first < last:
        end = at + (last - first) * cols
        yield slice(first, last), slice(0, cols), slice(at, end)
        at = end
    if last < rows:
        yield slice(last, rows), slice(0, cols - missing), slice(at, total)


def elements(stacks: Sequence[Stack], runs: Runs | None) -> tuple[list[Tensor], list[Tensor]]:
    """All weights and all gradients of a pass."""
    parts: list[Stack | Runs] = [*stacks, *([] if runs is None else [runs])]
    return [w for x in parts for w in x.w], [g for x in parts for g in x.g]
