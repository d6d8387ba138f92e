# SPDX-License-Identifier: Apache-2.0
"""Saved state whose fields were damaged: it loads to the same bits, or a named error says what."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.quantized import QuantizedMoment, QuantizedStore
from adapprox_ds.core.compact import CompactTensor, rebuild
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.grid import Grid, cut
from adapprox_ds.micro_adam.tensors import FeedbackError, WindowMean, WindowSquare
from adapprox_ds.micro_adam.window import WindowStore
from tests.adapprox.test_moment import MIXED, make


def _sparse() -> tuple[WindowStore, Callable[[int], ErrorStore]]:
    grid, spans = Grid(16, 4), cut(5, 50, 2, 16)
    window = WindowStore.zeros(56, grid, spans, window=3, density=0.2, betas=(0.9, 0.999))
    window.values.copy_(torch.arange(window.values.numel()).view_as(window.values))
    window.step = 2
    return window, lambda bits: ErrorStore.zeros(56, grid, spans, bits)


def _states() -> dict[str, CompactTensor]:
    """One of each kind that is saved."""
    window, error = _sparse()
    spans = [(3, 5, 4), (25, 4, 6), (0, 1, 3)]
    codes = QuantizedStore.from_dense(torch.arange(57.0), spans)
    mean = WindowMean(window, (56,), torch.float32)
    return {
        "factors": make(MIXED)[0],
        "bf16 factors": make(MIXED, torch.bfloat16, "std")[0].to(torch.float16),
        "codes": QuantizedMoment(codes, (57,), torch.bfloat16),
        "window": mean,
        "square": WindowSquare.of(mean),
        "error": FeedbackError(error(4), (7, 8), torch.float32),
        "full error": FeedbackError(error(32), (56,), torch.float32),
    }


STATES = _states()
Place = tuple[Any, ...]


def _places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Everything in nested containers: where to find it."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*at, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _places(item, (*at, i))


def _changed(value: Any, at: Place, change: Callable[[Any], Any]) -> Any:
    """A copy in which what lies at a place is changed."""
    if not at:
        return change(value)
    if isinstance(value, dict):
        return {k: _changed(v, at[1:], change) if k == at[0] else v for k, v in value.items()}
    items = [_changed(v, at[1:], change) if i == at[0] else v for i, v in enumerate(value)]
    return items if isinstance(value, list) else type(value)(items)


def _tensor_damage(t: Tensor) -> list[Any]:
    """Of another shape, dtype or kind."""
    flat = t.reshape(-1)
    others = [d for d in (torch.float16, torch.float32, torch.int8, torch.int64) if d != t.dtype]
    return [
        *(t[:n] for n in (0, 1, max(len(t) - 1, 0)) if n < len(t)),
        torch.cat([t, t[-1:]]) if len(t) else t.new_zeros(1),
        *(t.to(d) for d in others),
        t.unsqueeze(0),
        *([t.T.contiguous(), flat] if t.dim() > 1 and 1 not in t.shape else []),
        t.to_sparse(),
        t.to(torch.complex64).conj(),
        *([] if t.dtype is torch.uint8 else [torch._neg_view(t)] if t.is_floating_point() else []),
    ]


ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-(2**63), 2**62, 2**63, 10**30, -1, 0, 1, 127]),
    st.floats(),
    st.sampled_from(["", "std", "variance", "x"]),
    st.sampled_from([torch.zeros(3), torch.zeros(()), torch.float64, torch.int8, [], (), {}, [()]]),
    st.lists(st.integers(-3, 60), max_size=4).map(tuple),
)


def _same(a: Any, b: Any) -> bool:
    """Alike in structure, kind and bits; containers of either kind, numbers of equal value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (type(a) is type(b) is Tensor and (a.shape, a.dtype) == (b.shape, b.dtype)):
            return False
        return a.layout == b.layout and torch.equal(a.resolve_conj().resolve_neg(), b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(_same(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def _reloaded(saved: Any) -> Any:
    """Through a file, without trust."""
    buffer = io.BytesIO()
    torch.save(_Saved(rebuild, saved), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class _Saved:
    """Pickles as whatever it is told to."""

    def __init__(self, undo: Callable[..., Any], saved: Any) -> None:
        self.reduced = (undo, saved)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.reduced


def _check(kind: str, damaged: Any) -> None:
    """The same bits or a ValueError that names the kind of state."""
    state = STATES[kind]
    _, saved = state.__reduce_ex__(2)
    try:
        loaded = rebuild(*damaged)
    except ValueError as error:
        assert type(state).__name__ in str(error), error
        return
    assert _same(loaded.__reduce_ex__(2)[1], saved)


@pytest.mark.parametrize("kind", STATES)
def test_what_is_whole_loads(kind: str) -> None:
    """To the bit, from a file, without trust."""
    state = STATES[kind]
    _, saved = state.__reduce_ex__(2)
    loaded = _reloaded(saved)
    assert type(loaded) is type(state) and (loaded.shape, loaded.dtype) == (
        state.shape,
        state.dtype,
    )
    assert _same(loaded.__reduce_ex__(2)[1], saved)
    assert torch.equal(loaded.to_dense(), state.to_dense())


@pytest.mark.parametrize("kind", STATES)
def test_every_tensor_of_another_form(kind: str) -> None:
    """Each tensor cut, grown, cast, transposed, sparse, conjugated."""
    _, saved = STATES[kind].__reduce_ex__(2)
    for at in _places(saved):
        held = saved
        for key in at:
            held = held[key]
        if isinstance(held, Tensor):
            for other in _tensor_damage(held):
                _check(kind, _changed(saved, at, lambda _, other=other: other))


@pytest.mark.parametrize("kind", STATES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_field_with_another_value(kind: str, data: st.DataObject) -> None:
    """Anything in place of anything; items lost, doubled, exchanged."""
    _, saved = STATES[kind].__reduce_ex__(2)
    at = data.draw(st.sampled_from([p for p in _places(saved) if p]))

    def change(value: Any) -> Any:
        if isinstance(value, dict) and value and data.draw(st.booleans()):
            lost = data.draw(st.sampled_from(sorted(value)))
            return {k: v for k, v in value.items() if k != lost}
        if isinstance(value, (list, tuple)) and value and data.draw(st.booleans()):
            i, j = (data.draw(st.integers(0, len(value) - 1)) for _ in range(2))
            items = data.draw(
                st.sampled_from(
                    [[*value[:i], *value[i + 1 :]], [*value, value[i]], _exchanged(value, i, j)]
                )
            )
            return items if isinstance(value, list) else tuple(items)
        if type(value) is int and data.draw(st.booleans()):
            return value + data.draw(st.integers(-3, 3))
        return data.draw(ANY)

    _check(kind, _changed(saved, at, change))


def _exchanged(items: Any, i: int, j: int) -> list[Any]:
    done = list(items)
    done[i], done[j] = done[j], done[i]
    return done


@pytest.mark.parametrize(
    "places",
    [
        torch.full((3, 15), -1, dtype=torch.int16),
        torch.full((3, 15), 2**14, dtype=torch.int16),
    ],
    ids=["before", "beyond"],
)
def test_places_outside_blocks(places: Tensor) -> None:
    """A window's indices say where a step writes."""
    store = STATES["window"].store
    payload = store.to_payload()
    places = places[:, : payload["indices"].shape[1]]
    assert places.shape == payload["indices"].shape
    with pytest.raises(ValueError, match="entries at places"):
        WindowStore.from_payload(payload | {"indices": places})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b, "q", b.q[:8]), r"q of block 0 has shape \(8, 2\).*\(48, 2\)"),
        (lambda b: setattr(b, "u", b.u[:-1]), r"u of block 0 has shape \(63, 2\).*\(64, 2\)"),
        (lambda b: setattr(b, "u", b.u[:, :1]), r"u of block 0 has shape \(64, 1\)"),
        (lambda b: setattr(b, "q", b.q.to(torch.int8)), r"q of block 0 has dtype torch\.int8"),
        (lambda b: setattr(b, "q", b.q.T.contiguous().T[:, :0]), r"q of block 0 has shape \(48, 0"),
        (lambda b: setattr(b, "rank", math.nan), r"rank of block 0 is nan"),
        (lambda b: setattr(b, "rank", 0.0), r"rank of block 0 is 0\.0"),
        (lambda b: setattr(b, "rank", 1e9), r"rank of block 0 is 1000000000\.0"),
    ],
)
def test_a_step_trusts_no_factors(change: Callable[[Any], None], message: str) -> None:
    """Given in memory: refused before anything moves, with the sizes that the layout asks for."""
    p = torch.nn.Parameter(torch.ones(48, 64))
    optimizer = Adapprox([p], rank_init=2, rank_max=2)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    moment = saved["state"][0]["exp_avg_sq"]
    moment.store.settle()
    change(moment.store.factors[0])
    fresh, before = Adapprox([p], rank_init=2, rank_max=2), p.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        fresh.load_state_dict(saved)
        fresh.step()
    assert torch.equal(before, p.detach())
