# SPDX-License-Identifier: Apache-2.0
"""What both optimizers step: plain tensors of any strides. All else is refused, by name, at once.

How Adapprox's passes take strides and sign bits is in tests/core/cases_views.py, for all kernels;
what MicroAdam's do in tests/micro_adam/cases_windows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from adapprox_ds import Adapprox, MicroAdam
from tests.core import cases_views
from tests.core.test_inputs import Wrapper

OPTIMIZERS = [Adapprox, MicroAdam]
both = pytest.mark.parametrize("kind", OPTIMIZERS)


@pytest.mark.parametrize("preset", [None, "paper"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_strides_and_sign_bits(backend: str, preset: str | None) -> None:
    cases_views.check(backend, preset)


def test_the_part_of_a_complex_tensor() -> None:
    z = torch.complex(torch.zeros(64, 48), torch.full((64, 48), 7.0))
    p = torch.nn.Parameter(z.real)
    p.grad = torch.ones(64, 48)
    Adapprox([p], lr=0.01, weight_decay=0.0).step()
    torch.testing.assert_close(z.real, torch.full((64, 48), -0.01))
    assert torch.equal(z.imag, torch.full((64, 48), 7.0))


def test_both_parts_of_a_complex_tensor() -> None:
    z = torch.complex(torch.zeros(64, 48), torch.full((64, 48), 7.0))
    params = [torch.nn.Parameter(z.real), torch.nn.Parameter(z.imag)]
    for p in params:
        p.grad = torch.ones(64, 48)
    Adapprox(params, lr=0.01, weight_decay=0.0).step()
    torch.testing.assert_close(z, torch.full((64, 48), -0.01 + 6.99j))


def test_the_gradient_of_a_sum() -> None:
    """It is one number that stands for all."""
    w = torch.nn.Parameter(torch.zeros(512, 384))
    (w.grad,) = torch.autograd.grad(w.sum(), w)
    assert w.grad.untyped_storage().nbytes() == 4
    optimizer = Adapprox([w], lr=0.01, weight_decay=0.0)
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((512, 384), -0.02))


# --- Refused -------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@both
def test_dtensors_are_refused(kind: type[Any], one_rank: None) -> None:
    """Those of ``fully_shard``: where they are given, with what to do instead."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(torch.nn.Linear(40, 30))
    with pytest.raises(TypeError, match=r"'weight' is a DTensor, .*ZeRO instead of fully_shard"):
        kind(model.named_parameters())
    optimizer = kind([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match="is a DTensor"):
        optimizer.add_param_group({"params": list(model.parameters())})


def expanded() -> Tensor:
    return torch.zeros(1).expand(64, 48)


REFUSED: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "overlap": (expanded, ValueError, r"'odd' of shape \(64, 48\) .* same memory"),
    "wrapper": (Wrapper, TypeError, "'odd' is a Wrapper"),
    "complex": (
        lambda: torch.zeros(4, 4, dtype=torch.complex64),
        ValueError,
        "'odd' has dtype torch.complex64; allowed: real floating",
    ),
}


@both
@pytest.mark.parametrize("what", REFUSED)
def test_refused_where_recorded(kind: type[Any], what: str) -> None:
    make, error, message = REFUSED[what]
    with pytest.raises(error, match=f"{kind.__name__}: parameter {message}"):
        kind([("fine", torch.nn.Parameter(torch.zeros(4))), ("odd", make().requires_grad_())])


@both
@pytest.mark.parametrize("what", REFUSED)
def test_frozen_ones_pass_until_they_are_stepped(kind: type[Any], what: str) -> None:
    """As in AdamW; with a gradient they are refused before anything moves."""
    make, error, message = REFUSED[what]
    fine, odd = torch.nn.Parameter(torch.ones(4)), make()
    optimizer = kind([("fine", fine), ("odd", odd)])
    fine.grad = torch.ones(4)
    optimizer.step()
    optimizer.init_state()
    optimizer.metrics()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state.get(odd)
    before = fine.detach().clone()
    if what == "wrapper":
        return  # takes no gradient
    odd.grad = torch.ones_like(odd)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(fine, before) and int(optimizer.state[fine]["step"]) == 1


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_frozen_parameters_of_any_dtype(kind: type[Any], dtype: torch.dtype) -> None:
    frozen = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = kind([("frozen", frozen), ("p", p)])
    p.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.init_state()
    assert torch.equal(frozen, torch.ones(4, 4, dtype=dtype)) and not optimizer.state.get(frozen)
    assert p.max() < 1


@both
@pytest.mark.parametrize("shape", [(6, 9), (4, 12), (48,), (6, 4), (0,)], ids=str)
def test_resized_and_reshaped_parameters(kind: type[Any], shape: tuple[int, ...]) -> None:
    """The layout is that of the shape before: an error that says both, and nothing moves."""
    p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(6, 8))
    optimizer = kind([{"params": [("p", p)]}, {"params": [("q", q)], "lr": 0.1}])
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    before = p.detach().clone()
    q.grad = None
    q.data = torch.ones(shape)
    q.grad = torch.ones(shape)
    expected = f"{kind.__name__}: parameter 'q' has shape "
    with pytest.raises(ValueError, match=expected) as error:
        optimizer.step()
    assert str(shape) in str(error.value) and "(6, 8)" in str(error.value)
    assert torch.equal(p, before) and int(optimizer.state[p]["step"]) == 1


@both
def test_lazy_parameters_have_a_shape_when_they_are_stepped(kind: type[Any]) -> None:
    layer = torch.nn.LazyLinear(7)
    optimizer = kind(layer.parameters(), lr=0.1)
    layer(torch.ones(3, 9)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


@both
def test_sparse_gradients_before_anything_moves(kind: type[Any]) -> None:
    p, embedding = torch.nn.Parameter(torch.ones(5)), torch.nn.Embedding(20, 10, sparse=True)
    optimizer = kind([{"params": [p]}, {"params": embedding.parameters()}])
    p.grad = torch.ones(5)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False"):
        optimizer.step()
    assert torch.equal(p, torch.ones(5)) and not optimizer.state


# --- Autocast ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("knobs", [{}, {"factor_dtype": "bf16"}, {"preset": "paper"}], ids=str)
def test_a_step_inside_autocast(
    kind: type[Any], dtype: torch.dtype, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as outside; the closure stays inside."""
    if kind is MicroAdam and knobs:
        return
    monkeypatch.setenv("ADAPPROX_KERNELS", "torch")
    runs = []
    for inside in (False, True):
        p = torch.nn.Parameter(torch.ones(30, 20))
        optimizer = kind([p], lr=0.1, **knobs)
        seen = []

        def closure() -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))  # noqa: B023
            return torch.zeros(())

        with torch.autocast("cpu", dtype=dtype, enabled=inside):
            for step in range(4):
                p.grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(step))
                optimizer.step(closure)
                assert torch.is_autocast_enabled("cpu") == inside
        assert seen == [inside] * 4
        runs.append(p.detach())
    assert torch.equal(*runs) and bool(runs[0].isfinite().all())
