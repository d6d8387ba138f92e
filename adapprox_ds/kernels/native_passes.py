# SPDX-License-Identifier: Apache-2.0
"""The two passes in C++ on CPUs: packs operands, calls native.cpp, sums what chunks reduce to."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapprox_ds.kernels.interface import FirstPass, Means, SecondPass, StepScalars
from adapprox_ds.kernels.native_build import load

#: As in native.cpp: columns and widths of packed operands, rows of a tile.
_PAD, _WIDTH, _ROWS = 32, 16, 8
#: Vectors of the projection that are summed together.
_GROUP = 4
#: The most chunks of a block: threads that can share one.
_CHUNKS = 128
#: Elements of the chunks' projections.
_PARTIALS = 1 << 22

_Pointers = ctypes.Array[ctypes.c_void_p]


class _Stack(ctypes.Structure):
    """``struct Stack`` of native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "rows", "cols", "rank")),
        *((name, ctypes.c_int64) for name in ("width", "padded", "chunk", "threads")),
        *((name, ctypes.c_void_p) for name in ("g", "m", "scales", "q", "ut")),
        *((name, ctypes.c_void_p) for name in ("floor_rows", "floor_cols")),
        *((name, ctypes.c_float) for name in ("beta1", "gain", "rest2")),
        *((name, ctypes.c_float) for name in ("of_mean", "of_new")),
        *((name, ctypes.c_float) for name in ("correction", "eps", "largest")),
        *((name, ctypes.c_int32) for name in ("of_gradients", "clips", "kept")),
        ("salt", ctypes.c_uint32),
    ]


class _Operands:
    """A stack's operands as native.cpp takes them; holds on to what it points to."""

    def __init__(
        self,
        g: list[Tensor],
        m: Means | None,
        q: Tensor,
        u: Tensor,
        floor: Tensor | None,
        width: int,
        s: StepScalars,
    ) -> None:
        (rows, cols), blocks, rank = g[0].shape, len(g), q.shape[2]
        self.padded, self.width = _up(cols, _PAD), _up(width, _WIDTH)
        # A chunk's projection is at most a sixteenth of the chunk, and all together are bounded.
        most = max(1, _PARTIALS // (blocks * self.width * self.padded))
        self.chunk = max(_up(width * 16, _ROWS), _up(-(-rows // min(_CHUNKS, most)), _ROWS))
        self.chunks = -(-rows // self.chunk)
        if floor is None:
            floor_rows, floor_cols = q.new_zeros(blocks, rows), q.new_zeros(blocks, self.padded)
        else:
            floor = floor * s.beta2**0.25  # on both sides: sqrt(beta_2) in all
            floor_rows = floor[:, 0, :rows].contiguous()
            floor_cols = packed(floor[:, 1, :cols], self.padded)
        # (sqrt(beta_2) S)^2 = beta_2 S^2
        ut = packed(u.mT * s.beta2**0.5, self.padded)
        kept, means, scales = _kept(m)
        lists = [x and pointers(x) for x in (g, means, scales)]
        self.held = (q.contiguous(), ut, floor_rows, floor_cols, lists)
        self.stack = _Stack(
            *(blocks, rows, cols, rank, self.width, self.padded, self.chunk),
            torch.get_num_threads(),
            *(ctypes.cast(x, ctypes.c_void_p) if x else None for x in lists),
            *(x.data_ptr() for x in self.held[:4]),
            *(s.beta1, s.gain, 1.0 - s.beta2),
            *s.ahead,
            *(s.correction, s.eps, s.largest),
            *(s.of_gradients, s.clips, kept, s.salt),
        )


def first_pass(
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    sketch: Tensor,
    floor: Tensor | None,
    s: StepScalars,
) -> FirstPass:
    """Reduce over V and X; as :func:`adapprox_ds.kernels.tiles.first_pass`, fp32 alone."""
    (rows, cols), blocks, width = g[0].shape, len(g), sketch.shape[2]
    o = _Operands(g, None, q, u, floor, width, s)
    sketch = pad(packed(sketch, o.width), (0, 0, 0, o.padded - cols))
    out, row_sums = q.new_empty(blocks, rows, o.width), q.new_empty(blocks, rows)
    col_sums = q.new_empty(blocks, o.chunks, o.padded)
    squares = torch.empty(blocks, o.chunks, dtype=torch.float64, device="cpu")
    _call("first_pass", o, sketch, out, row_sums, col_sums, squares)
    return FirstPass(
        out[..., :width], row_sums, col_sums.sum(1)[:, :cols], squares.sum(1).to(q.dtype)
    )


def second_pass(
    w: list[Tensor],
    m: Means | None,
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    basis: Tensor,
    row_weights: Tensor,
    clip: Tensor,
    s: StepScalars,
) -> SecondPass:
    """Update and reduce; as :func:`adapprox_ds.kernels.tiles.second_pass`, fp32 alone."""
    (_, cols), blocks, width = g[0].shape, len(g), basis.shape[2]
    o = _Operands(g, m, q, u, floor, width, s)
    used = _up(width, _GROUP)
    projection = q.new_empty(blocks, o.chunks, used, o.padded)
    col_sums = q.new_empty(blocks, o.chunks, o.padded)
    _call(
        "second_pass",
        o,
        pointers(w),
        packed(basis, o.width),
        ctypes.c_int64(used),
        row_weights.contiguous(),
        clip.contiguous(),
        ctypes.c_float(1.0 - s.lr * s.weight_decay),
        ctypes.c_float(s.rate(m is not None)),
        projection,
        col_sums,
    )
    return SecondPass(projection.sum(1)[:, :width, :cols], col_sums.sum(1)[:, :cols])


def _kept(m: Means | None) -> tuple[int, list[Tensor] | None, list[Tensor] | None]:
    """How first moments are kept (``enum Kept``), what holds them, and the scales of codes."""
    if m is None:
        return 0, None, None
    if isinstance(m[0], Tensor):
        return int(m[0].dtype == torch.bfloat16), list(m), None  # type: ignore[arg-type]
    return 2, [x.codes for x in m], [x.scales for x in m]  # type: ignore[union-attr]


def pointers(tensors: list[Tensor]) -> _Pointers:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def packed(x: Tensor, width: int) -> Tensor:
    """``x`` with zeros up to ``width`` columns; contiguous, as padding by nothing would not be."""
    return pad(x, (0, width - x.shape[-1])).contiguous()


def _call(name: str, o: _Operands, *arguments: Any) -> None:
    raw = (ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
    getattr(load("native"), name)(ctypes.byref(o.stack), *raw)


def _up(size: int, step: int) -> int:
    """The least multiple of ``step`` that holds ``size``."""
    return -(-size // step) * step
