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
class Sketches:
    """What the last factors say of a stack before the pass; adapprox/algebra.py has the formulas.

    Attributes:
        x: the sketch's columns, (B, n, w).
        z: the test sketch's columns, (B, m, t).
        row_weights: D_r, (B, m).
        col_weights: D_c, (B, n).
        floor_rows: (B, m) or None.
        floor_cols: (B, n) or None.
    """

    x: Tensor
    z: Tensor
    row_weights: Tensor
    col_weights: Tensor
    floor_rows: Tensor | None
    floor_cols: Tensor | None


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
