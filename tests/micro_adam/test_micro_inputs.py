# SPDX-License-Identifier: Apache-2.0
"""MicroAdam on parameters and gradients out of the ordinary: as AdamW, or an error, before a step.

Strides and sign bits are in tests/micro_adam/cases_windows.py, for all kernels.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from adapprox_ds import MicroAdam
from tests.core.test_inputs import Wrapper


def test_the_part_of_a_complex_tensor() -> None:
    z = torch.complex(torch.zeros(64, 48), torch.full((64, 48), 7.0))
    p = torch.nn.Parameter(z.real)
    p.grad = torch.ones(64, 48)
    MicroAdam([p], lr=0.01, weight_decay=0.0, density=1.0).step()
    torch.testing.assert_close(z.real, torch.full((64, 48), -0.01))
    assert torch.equal(z.imag, torch.full((64, 48), 7.0))


def test_the_gradient_of_a_sum() -> None:
    """It is one number that stands for all; the accumulator has no room in it."""
    w = torch.nn.Parameter(torch.zeros(512, 384))
    (w.grad,) = torch.autograd.grad(w.sum(), w)
    assert w.grad.untyped_storage().nbytes() == 4
    optimizer = MicroAdam([w], lr=0.01, weight_decay=0.0, density=1.0)
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((512, 384), -0.02))
    assert torch.equal(w.grad, torch.ones(512, 384))


def test_a_gradient_in_a_file_that_is_only_read(tmp_path: Path) -> None:
    """To write there would end the process."""
    file = tmp_path / "gradient"
    file.write_bytes(torch.ones(64, 48).numpy().tobytes())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        p = torch.nn.Parameter(torch.zeros(64, 48))
        with pytest.warns(UserWarning, match="not writable"):
            p.grad = torch.frombuffer(held, dtype=torch.float32).view(64, 48)
        MicroAdam([p], lr=0.01, weight_decay=0.0, density=1.0).step()
        torch.testing.assert_close(p.detach(), torch.full((64, 48), -0.01))
        p.grad = None


def test_gradients_stay_as_they_are() -> None:
    """As with AdamW: one gradient may be two parameters', and may be looked at afterwards."""
    grad = torch.randn(40)
    kept, params = grad.clone(), [torch.nn.Parameter(torch.zeros(40)) for _ in range(2)]
    for p in params:
        p.grad = grad
    optimizer = MicroAdam(params, density=1.0)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(grad, kept)
    assert torch.equal(*params) and params[1].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no such gradients")
def test_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    """Parameters that take gradients of another dtype keep the bits of their own."""
    start, grad = torch.linspace(-1, 1, 300, dtype=dtype), torch.linspace(-2, 3, 300)
    p, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    p.grad_dtype = torch.bfloat16
    p.grad, twin.grad = grad.bfloat16(), grad.bfloat16().to(dtype)
    for x in (p, twin):
        optimizer = MicroAdam([x], density=1.0)
        for _ in range(3):
            optimizer.step()
    assert torch.equal(p, twin)
    if dtype == torch.float64:
        assert not torch.equal(p.detach(), p.detach().float().double())


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: torch.zeros(1).expand(64, 48), ValueError, "MicroAdam: parameter 'b' .* strides"),
        (Wrapper, TypeError, "MicroAdam: parameter 'b' is a Wrapper"),
    ],
)
def test_parameters_that_cannot_be_stepped_are_refused(made, error, message) -> None:  # type: ignore[no-untyped-def]
    """By name, where they are given; frozen ones only once they are stepped."""
    p = torch.nn.Parameter(torch.zeros(4))
    q = made()
    with pytest.raises(error, match=message):
        MicroAdam([("a", p), ("b", q.requires_grad_())])
    if isinstance(q, Wrapper):
        return
    q = made()
    optimizer = MicroAdam([("a", p), ("b", q)])
    p.grad, q.grad = torch.ones(4), torch.ones(64, 48)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert not p.any()


def changed(what: str, p: torch.nn.Parameter) -> None:
    """Make a parameter one that cannot be stepped."""
    p.grad = None
    if what == "sparse":
        p.grad = torch.ones_like(p).to_sparse()
        return
    shape = {"resized": (6, 9), "reshaped": (4, 12), "smaller": (6, 4)}[what]
    p.data = torch.ones(shape)
    p.grad = torch.ones(shape)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("resized", r"'b' has shape \(6, 9\) .* \(6, 8\)"),
        ("reshaped", r"'b' has shape \(4, 12\) .* \(6, 8\)"),
        ("smaller", r"'b' has shape \(6, 4\) .* \(6, 8\)"),
        ("sparse", "sparse gradients are not supported, and 'b'"),
    ],
)
def test_nothing_moves_where_one_cannot(what: str, message: str) -> None:
    """Of two groups the second has the fault; the first and its state are those of before."""
    p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(6, 8))
    optimizer = MicroAdam([{"params": [("a", p)]}, {"params": [("b", q)], "lr": 0.1}])
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    before = p.detach().clone()
    changed(what, q)
    with pytest.raises((RuntimeError, ValueError), match=f"MicroAdam: .*{message}"):
        optimizer.step()
    assert torch.equal(p, before) and int(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_without_gradient_do_not_move(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding rows of an embedding: their error is exactly 0, whatever lies in their groups."""
    monkeypatch.setenv("ADAPPROX_KERNELS", backend)
    p = torch.nn.Parameter(torch.ones(64, 33, dtype=dtype))
    start = p.detach().clone()
    optimizer = MicroAdam([p], lr=0.1, weight_decay=0.0, window=2, density=0.05)
    still = torch.zeros(64, dtype=torch.bool)
    still[[0, 5, 6, 40, 63]] = True
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        grad = torch.randn(64, 33, generator=random) + 0.3
        grad[still] = 0.0
        p.grad = grad.to(dtype)
        optimizer.step()
    assert torch.equal(p[still], start[still])
    assert not optimizer.state[p]["error"].to_dense()[still].any()
    assert (p[~still] != start[~still]).float().mean() > 0.9
