# SPDX-License-Identifier: Apache-2.0
"""The small algebra of a step's stacks, each on the backend that takes it.

adapprox/algebra.py has the formulas, and is the torch backend. C++ has kernels for all but the new
factors. Triton's are for factors and sketches of few columns, and take all stacks in a few
launches, since on a GPU the launches of so many small operations would take longer than the pass
over the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from adapprox_ds.adapprox import algebra
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.adapprox.kernels.interface import Found, Past, Sketches, Solved
from adapprox_ds.core.kernels.backends import chosen, is_forced
from adapprox_ds.core.kernels.self_check import differing, is_right

#: The most columns of a factor whose sketches C++ makes. Beyond it a quadratic form of each row is
#: most of the work, which as a matrix product is faster.
_NATIVE_LIMIT = 96
#: Blocks, rows and columns of the self-check's example: more rows than a program takes.
_EXAMPLE = 2, 300, 70


def _triton() -> Any:
    """Triton's kernels, which are imported where they are used."""
    return import_module("adapprox_ds.adapprox.kernels.triton_small")


class Backend(NamedTuple):
    """What takes a stack.

    Attributes:
        name: "torch", "native" or "triton".
        size: the side of Triton's tiles; 0 for the others.
    """

    name: str
    size: int = 0


def backend_of(
    columns: Sequence[int], dtype: torch.dtype, factor: Tensor, h: Hyperparameters
) -> Backend:
    """Choose what takes a stack.

    Triton's kernels are checked first, where nobody asked for them (core/kernels/self_check.py).

    Args:
        columns: the numbers of columns of its factors, and of both sketches.
        dtype: what it is computed in.
        factor: one of its factors.
        h: the settings.

    Raises:
        ValueError, RuntimeError: see :func:`adapprox_ds.core.kernels.backends.chosen`.
    """
    device, kept = factor.device, factor.dtype
    choice = chosen(device, native_pass.LIBRARY)
    if dtype != torch.float32 or choice == "torch":
        return Backend("torch")
    if choice == "native":
        return Backend("native")
    if max(columns) > _triton().LIMIT or kept not in (torch.float32, torch.bfloat16):
        return Backend("torch")
    size = _triton().size_of(*columns)
    form = (str(device), "small algebra", size, kept)
    right = is_forced() or is_right(form, lambda: _compare(size, kept, device))
    return Backend("triton", size) if right else Backend("torch")


Item = TypeVar("Item")
Result = TypeVar("Result")


def _by_backend(
    items: Sequence[Item],
    backends: Sequence[Backend],
    work: dict[str, Callable[[list[Item], int], Sequence[Result]]],
) -> list[Result]:
    """Do each item's work on its backend, those of one backend together; results in order.

    Args:
        items: what there is to do.
        backends: what takes each.
        work: by the backend's name what does items, given the side of tiles; "native" may be
            missing, and is then "torch".
    """
    found: dict[int, Result] = {}
    for of in dict.fromkeys(backends):
        places = [i for i, other in enumerate(backends) if other == of]
        do = work[of.name if of.name in work else "torch"]
        found.update(zip(places, do([items[i] for i in places], of.size), strict=True))
    return [found[i] for i in range(len(items))]


def grams(factors: Sequence[tuple[Tensor, int]], backends: Sequence[Backend]) -> list[Tensor]:
    """A^T A of each stack, (B, k, k), fp64, from pairs of A, (B, r, k), and its first row."""
    return _by_backend(
        factors,
        backends,
        {
            "torch": lambda items, _: [algebra.gram(a[:, first:]) for a, first in items],
            "native": lambda items, _: [native_pass.gram(a, first) for a, first in items],
            "triton": lambda items, size: _triton().grams(
                *map(list, zip(*items, strict=True)), size
            ),
        },
    )


def sketches(stacks: Sequence[Past], backends: Sequence[Backend]) -> list[Sketches]:
    """The weights, the floor and the sketches of each stack, from its last factors."""
    return _by_backend(
        stacks,
        backends,
        {
            "torch": lambda items, _: [algebra.sketches(x, algebra.gram(x.u)) for x in items],
            "native": lambda items, _: [_native_sketches(x) for x in items],
            "triton": lambda items, size: _triton().sketches(items, size),
        },
    )


def _native_sketches(x: Past) -> Sketches:
    gram_u = native_pass.gram(x.u, 0)
    if x.q.shape[2] > _NATIVE_LIMIT:
        return algebra.sketches(x, gram_u)
    return native_pass.sketches(x, gram_u, algebra.row_scale(x.gram_q, gram_u, x.rows))


def products(stacks: Sequence[Found], backends: Sequence[Backend]) -> list[tuple[Tensor, Tensor]]:
    """G, H and ||T||_F^2 of each stack end to end, and S; see :func:`algebra.products`."""
    return _by_backend(
        stacks,
        backends,
        {
            "torch": lambda items, _: [algebra.products(x) for x in items],
            "native": lambda items, _: [
                native_pass.products(x, algebra.row_squares(x)) for x in items
            ],
            "triton": lambda items, size: _triton().products(items, size),
        },
    )


def refactor(stacks: Sequence[Solved], backends: Sequence[Backend]) -> list[Tensor]:
    """Write the new factors of each stack.

    Args:
        stacks: what they are made of.
        backends: what takes each stack.

    Returns:
        For each stack the error ratios, (B, k), or those of all k columns, (B, 1), fp64.
    """
    return _by_backend(
        stacks,
        backends,
        {
            "torch": lambda items, _: algebra.refactor(items),
            "triton": lambda items, size: _triton().refactor(items, size),
        },
    )


def _compare(size: int, kept: torch.dtype, device: torch.device) -> str | None:
    """What differs between Triton's kernels and torch's over an example, or None.

    The example is made of seeded random numbers.
    """
    rank, width, tests = size // 2, size - 3, size
    (blocks, rows, cols), random = _EXAMPLE, torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32)
        return drawn.to(device)

    q, u = numbers(blocks, rows, rank), numbers(blocks, cols, rank)
    # Not far from the factors, as in a step; columns of unequal energy.
    root = (q * 0.7 ** torch.arange(rank, device=device)) @ u.mT + 0.1 * numbers(blocks, rows, cols)
    weight = numbers(blocks, rows).abs()
    results = []
    for of in (Backend("triton", size), Backend("torch")):
        (gram,) = grams([(q, 1)], [of])
        past = Past(
            q,
            u,
            gram,
            (list(range(blocks)), [-1] * blocks),
            width,
            tests,
            5,
            rows + 9,
            0.1,
        )
        (x,) = sketches([past], [of])
        shares = (weight * x.row_scale).double()
        found = Found(
            root @ x.x, x.z, x.z.mT @ root, weight.double(), shares,
            x.row_squares, x.row_scale, x.col_squares, 1,
        )  # fmt: skip
        ((sums, s),) = products([found], [of])
        new_q, new_u = (torch.zeros_like(a, dtype=kept) for a in (q, u))
        made = Solved(
            found.y, found.p, sums, s, rank,
            list(new_q), list(new_u), (5, rows + 9), 1,
        )  # fmt: skip
        (errors,) = refactor([made], [of])
        parts: dict[str, Any] = {name: getattr(x, name) for name in Sketches.__slots__}
        parts |= {"sums": sums, "s": s, "errors": errors}
        # Factors of nearly equal energy may be rotated, and the sign of a column is free.
        product = new_q.double() @ new_u.double().mT
        results.append({**parts, "gram": gram, "factors": product.to(kept)})
    return differing(*results)
