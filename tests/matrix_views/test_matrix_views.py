# SPDX-License-Identifier: Apache-2.0
"""MatrixViews: stock optimizers on matrices, in plain torch and on ZeRO's shards."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Adafactor, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adapprox_ds.zero import MatrixViews
from tests.matrix_views.cases_matrix_views import CASES, MOVES, RANKS
from tests.world import run_world, run_worlds

#: Cases that need pytorch_optimizer.
PEERS = "came|galore"
#: Case -> the number of ranks that it runs on, where that is not two.
ELSEWHERE = {
    **{f"equals_{name}": world for name, world in RANKS.items()},
    **{f"move_{name}": move.world for name, move in MOVES.items()},
}
HAS_PEERS = importlib.util.find_spec("pytorch_optimizer") is not None


def can_run(case: str) -> bool:
    """Whether what the case needs is installed."""
    return HAS_PEERS or not re.search(PEERS, case)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is saved here is loaded there."""
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def outcomes(scratch: Path) -> dict[str, str]:
    """All cases on two ranks; the second halves of resumed runs in new processes."""
    cases = [name for name in CASES if can_run(name) and name not in ELSEWHERE]
    second = [name for name in cases if name.startswith("second_")]
    first = [name for name in cases if name not in second]
    return {
        **run_world(2, "tests.matrix_views.cases_matrix_views", first, scratch),
        **run_world(2, "tests.matrix_views.cases_matrix_views", second, scratch),
    }


@pytest.fixture(scope="module")
def elsewhere(outcomes: dict[str, str], scratch: Path) -> dict[str, str]:
    """Cases on one rank and on three, some of which load what two ranks saved."""
    worlds = [
        (
            world,
            "tests.matrix_views.cases_matrix_views",
            [c for c, ranks in ELSEWHERE.items() if ranks == world],
        )
        for world in sorted(set(ELSEWHERE.values()))
    ]
    return run_worlds([(n, module, list(filter(can_run, cs))) for n, module, cs in worlds], scratch)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ELSEWHERE])
def test_under_zero(outcomes: dict[str, str], case: str) -> None:
    """See tests/matrix_views/cases_matrix_views.py."""
    if re.search(PEERS, case):
        pytest.importorskip("pytorch_optimizer")
    assert not outcomes[case], outcomes[case]


@pytest.mark.parametrize("case", ELSEWHERE)
def test_on_other_ranks(elsewhere: dict[str, str], case: str) -> None:
    """With the scope "matrix" results do not depend on the ranks, and runs move between them."""
    if re.search(PEERS, case):
        pytest.importorskip("pytorch_optimizer")
    assert not elsewhere[case], elsewhere[case]


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def descend(optimizer: Any, params: list[torch.nn.Parameter], steps: range) -> None:
    """Steps on gradients that depend on the weights and the step; one parameter has none at 1."""
    for step in steps:
        for i, p in enumerate(params):
            p.grad = None if (i, step) == (0, 1) else (p.detach() - step).sin()
        optimizer.step()


SHAPES = ((6, 8), (1, 5), (5, 1), (2, 2), (7,), ())


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_is_the_class_itself(tensor_rate: bool) -> None:
    """To the bit, on parameters of up to two dimensions; also after saving and loading."""

    def build(kind: Callable[..., Any]) -> tuple[list[torch.nn.Parameter], Any, LambdaLR]:
        params = parameters(*SHAPES)
        lr = torch.tensor(0.1) if tensor_rate else 0.1
        groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.3}]
        optimizer = kind(groups, lr=lr, weight_decay=0.1)
        return params, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def run(params: list[torch.nn.Parameter], optimizer: Any, scheduler: Any, r: range) -> None:
        for step in r:
            descend(optimizer, params, range(step, step + 1))
            scheduler.step()

    stock = build(Adafactor)
    ours = build(lambda groups, **args: MatrixViews(Adafactor, groups, **args))
    run(*stock, range(6))
    run(*ours, range(3))
    buffer = io.BytesIO()
    torch.save(ours[1].state_dict(), buffer)
    resumed = build(lambda groups, **args: MatrixViews(Adafactor, groups, **args))
    for p, q in zip(resumed[0], ours[0], strict=True):
        p.data.copy_(q.data)
    buffer.seek(0)
    resumed[1].load_state_dict(torch.load(buffer))
    resumed[2].load_state_dict(ours[2].state_dict())
    for continued in (ours, resumed):
        run(*continued, range(3, 6))
        assert all(map(torch.equal, continued[0], stock[0]))


def test_more_dimensions_are_a_matrix() -> None:
    """The most nearly square one, which views the parameter."""
    (weight,) = parameters((4, 3, 2, 2))
    (matrix,) = parameters((4, 12))
    matrix.data.copy_(weight.data.view(4, 12))
    ours, stock = MatrixViews(Adafactor, [("conv", weight)], lr=0.1), Adafactor([matrix], lr=0.1)
    descend(ours, [weight], range(2, 5))
    descend(stock, [matrix], range(2, 5))
    assert torch.equal(weight.view(4, 12), matrix)
    assert ours.state[weight]["pieces"][0]["row_var"].shape == (4, 1)


def test_vectors_go_to_their_own_class() -> None:
    """So do matrices of a group that says so; learning rates keep their proportion."""
    embedding, matrix, conv, bias, scale = params = parameters((9, 4), (6, 8), (4, 3, 2), (7,), ())
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs[2] = torch.nn.Parameter(theirs[2].detach().view(4, 6))
    groups = [
        {"params": [matrix, conv, bias]},
        {"params": [embedding], "vectors": True, "lr": 0.04},
        {"params": [scale], "weight_decay": 0.0},
    ]
    decoupled = {"lr": 1e-3, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    ours = MatrixViews(Muon, groups, lr=0.02, vectors=AdamW, vectors_args=decoupled)
    stock: list[tuple[Any, list[torch.nn.Parameter]]] = [
        (Muon(theirs[1:3], lr=0.02), theirs[1:3]),
        (AdamW([theirs[3]], **decoupled), theirs[3:4]),
        (AdamW([theirs[0]], **{**decoupled, "lr": 2e-3}), theirs[:1]),
        (AdamW([theirs[4]], **{**decoupled, "weight_decay": 0.0}), theirs[4:]),
    ]
    for step in range(2, 6):
        for optimizer in (ours, *(optimizer for optimizer, _ in stock)):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        descend(ours, params, range(step, step + 1))
        for optimizer, own in stock:
            descend(optimizer, own, range(step, step + 1))
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p.detach().reshape(-1), q.detach().reshape(-1), rtol=0, atol=0)


def test_a_group_added_later() -> None:
    """The others' state stays, and a closure is called once a step."""
    first, second = parameters((6, 8), (3, 2, 4))
    alone = copy.deepcopy(first)
    ours, stock = MatrixViews(Adafactor, [first]), Adafactor([alone])
    descend(ours, [first], range(2, 4))
    ours.add_param_group({"params": [second]})
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        first.grad, second.grad = first.detach().cos(), second.detach().cos()
        return torch.ones(())

    assert ours.step(closure) == 1
    assert calls == [True]
    descend(stock, [alone], range(2, 4))
    alone.grad = alone.detach().cos()
    stock.step()
    assert torch.equal(first, alone)
    assert ours.state[second]["spans"] == [(0, 6, 4)]


def test_storage_is_let_go() -> None:
    """Between steps nothing of ours keeps a gradient or weights alive that others have freed."""
    weight = torch.nn.Parameter(torch.from_numpy(values := np.ones((4, 3, 2), np.float32)))
    weight.grad = torch.from_numpy(gradient := np.ones((4, 3, 2), np.float32))
    held = [weakref.ref(values), weakref.ref(gradient)]
    del values, gradient
    optimizer = MatrixViews(Adafactor, [weight])
    optimizer.step()
    weight.grad, weight.data = None, weight.data.clone()
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    weight.grad = torch.ones(4, 3, 2)
    optimizer.step()
    assert float(optimizer.state[weight]["pieces"][0]["step"]) == 2


class Plain(Optimizer):
    """Says no to what it does not know, as every class does in its own way."""

    def __init__(self, params: Any, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: MatrixViews(torch.nn.Linear, p), TypeError, "optimizer_cls=.*Linear"),
        (lambda p: MatrixViews(AdamW(p), p), TypeError, "optimizer_cls=AdamW"),
        (lambda p: MatrixViews(Muon, p, vectors=dict), TypeError, "vectors=<class 'dict'>"),
        (lambda p: MatrixViews(Plain, p, momentum=0.9), TypeError, "argument 'momentum'"),
        (lambda p: MatrixViews(AdamW, p, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda p: MatrixViews(Muon, p, vectors_args={"lr": 1.0}), ValueError, "without vectors"),
        (
            lambda p: MatrixViews(Plain, p, vectors=AdamW, vectors_args={"lr": 1.0}),
            ValueError,
            "lr=0 with a learning rate in vectors_args",
        ),
        (
            lambda p: MatrixViews(AdamW, p, scope="rows"),
            ValueError,
            r"scope='rows' is not allowed; allowed: \('partition', 'matrix'\)",
        ),
        (
            lambda p: MatrixViews(AdamW, [{"params": p, "vectors": True}]),
            ValueError,
            "'vectors': True in a parameter group",
        ),
        (
            lambda p: MatrixViews(Muon, [{"params": p, "vectors": 1}], vectors=AdamW),
            ValueError,
            "'vectors': 1 in a parameter group",
        ),
        (
            lambda p: MatrixViews(AdamW, [torch.ones(2, dtype=torch.cfloat, requires_grad=True)]),
            ValueError,
            "has dtype torch.complex64",
        ),
    ],
)
def test_bad_arguments(build: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    """Named, with what is allowed, before anything is trained."""
    with pytest.raises(error, match=message):
        build(parameters((4, 3)))


def test_what_a_step_refuses() -> None:
    """Sparse gradients, strides that no matrix views, states of other classes or shapes; and what
    a class refuses that another could take."""
    bias = parameters((3,))
    with pytest.raises(ValueError, match="Muon refuses what is no matrix .*give vectors="):
        descend(MatrixViews(Muon, bias), bias, range(1))
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients.*sparse=False"):
        MatrixViews(Adafactor, embedding.parameters()).step()
    (conv,) = parameters((4, 3, 2, 2))
    conv.data = conv.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"parameter 'conv' has shape \(4, 3, 2, 2\) and strides"):
        descend(MatrixViews(Adafactor, [("conv", conv)]), [conv], range(1))
    (weight,) = parameters((4, 3, 2))
    saved = MatrixViews(Adafactor, [weight])
    descend(saved, [weight], range(2, 3))
    for build, message in (
        (lambda: MatrixViews(AdamW, [weight]), r"'Adafactor'.*allowed here: .*'AdamW'"),
        (lambda: MatrixViews(Adafactor, parameters((2, 3, 4))), "1 pieces where this tensor has 1"),
    ):
        optimizer = build()
        optimizer.load_state_dict(saved.state_dict())
        with pytest.raises(RuntimeError, match=message):
            descend(optimizer, optimizer.param_groups[0]["params"], range(2, 3))
