# SPDX-License-Identifier: Apache-2.0
"""Parameters and gradients that are not plain dense tensors: flattened, written back, refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from adapprox_ds.core.inputs import (
    as_flat,
    overlaps_itself,
    refuse_unsteppable,
    require_gradient,
    write_back,
)
from adapprox_ds.micro_adam.grid import Grid
from adapprox_ds.micro_adam.tensors import WindowMean
from adapprox_ds.micro_adam.window import WindowStore


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape).to(dtype)


VIEWS = {
    "dense": lambda: numbers(4, 6),
    "of no dimension": lambda: numbers(),
    "empty": lambda: numbers(0, 3),
    "one element of stride 7": lambda: numbers(3).as_strided((1, 1), (7, 7)),
    "transposed": lambda: numbers(4, 6).mT,
    "every other": lambda: numbers(5, 6)[:, ::2],
    "columns": lambda: numbers(5, 6)[1:, 2:5],
    "channels last": lambda: numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "real part": lambda: torch.complex(numbers(3, 4), -numbers(3, 4)).real,
    "imaginary part": lambda: torch.complex(numbers(3, 4), -numbers(3, 4)).imag,
    "negative bit": lambda: torch.complex(numbers(3, 4), numbers(3, 4)).conj().imag,
    "negative bit, dense": lambda: torch._neg_view(numbers(3, 4)),
    "conjugate bit": lambda: torch.complex(numbers(3, 4), numbers(3, 4)).conj(),
    "interlocking strides": lambda: numbers(10).as_strided((2, 3), (3, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_flat_is_dense_and_goes_back(name: str) -> None:
    """Elements in logical order; what is written arrives, and nothing beside it."""
    x = VIEWS[name]()
    start, flat = x.clone(), as_flat(x)
    assert flat.is_contiguous() and not flat.is_neg() and not flat.is_conj()
    assert torch.equal(flat, torch.tensor(x.flatten().tolist(), dtype=x.dtype))
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    before, inside = whole.clone(), torch.zeros_like(whole, dtype=torch.bool)
    flat.mul_(-3.0)
    write_back(x, flat)
    assert torch.equal(x, start * -3.0)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    assert torch.equal(whole[~inside], before[~inside])


def test_flat_of_a_dense_tensor_is_a_view() -> None:
    x = numbers(4, 6)
    assert as_flat(x).data_ptr() == x.data_ptr()


def test_overlap_is_found_exactly() -> None:
    """Against counting of places, for all small sizes and strides."""
    found = set()
    memory = torch.zeros(100)
    for sizes in itertools.product((0, 1, 2, 3), repeat=2):
        for strides in itertools.product(range(5), repeat=2):
            x = memory.as_strided(sizes, strides)
            pairs = itertools.product(range(sizes[0]), range(sizes[1]))
            places = [i * strides[0] + j * strides[1] for i, j in pairs]
            expected = len(set(places)) < len(places)
            found.add(expected)
            assert overlaps_itself(x) == expected, (sizes, strides)
    assert found == {True, False}


class Wrapper(Tensor):
    """Elements somewhere else."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, (4,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise AssertionError(func)


def test_what_cannot_be_stepped_is_refused_by_name() -> None:
    window = WindowStore.zeros(4, Grid(8, 4), (), window=1, density=1.0, betas=(0.9, 0.9))
    for p, error, message in (
        (torch.zeros(1).expand(64, 48), ValueError, r"'w' of shape \(64, 48\) .* same memory"),
        (torch.zeros(4).unfold(0, 3, 1), ValueError, "'w' .* several elements"),
        (Wrapper(), TypeError, r"O: parameter 'w' is a Wrapper, .* ZeRO .*to_local"),
        (WindowMean(window, (4,), torch.float32), TypeError, "'w' is a WindowMean"),
        (torch.zeros(3).to_sparse(), TypeError, "'w' has the layout torch.sparse_coo"),
    ):
        with pytest.raises(error, match=message):
            refuse_unsteppable("O", "w", p)
    for fine in (*(make() for make in VIEWS.values()), torch.zeros(3, device="meta")):
        refuse_unsteppable("O", "w", torch.nn.Parameter(fine))


def test_gradients_that_cannot_be_used_are_refused_by_name() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    for grad, error, message in (
        (torch.zeros(4).to_sparse(), RuntimeError, "O: sparse gradients .* 'w' has one"),
        (Wrapper(), TypeError, "the gradient of 'w' is a Wrapper"),
    ):
        p.grad = grad
        with pytest.raises(error, match=message):
            require_gradient("O", "w", p)
    p.grad = torch.zeros(4)
    p.data = torch.zeros(5)
    with pytest.raises(ValueError, match=r"'w' has shape \(4,\) on cpu where .* has \(5,\)"):
        require_gradient("O", "w", p)
    p.grad = torch.zeros(1).expand(5)
    assert require_gradient("O", "w", p) is p.grad
