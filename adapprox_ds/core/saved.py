# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of a saved optimizer state, made when it is loaded.

Steps and kernels address memory by the sizes that a state contains, so that a wrong size in a
damaged checkpoint would let them read foreign memory. Each check returns the value, or raises a
ValueError that names the field, its value and what is allowed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: The largest size or offset that is accepted: sums of two such numbers are still int64.
_MOST = 2**62

_REMEDY = "the checkpoint is damaged, or another program wrote it; use another one"


def fields(payload: Any, owner: str, version: int, names: Sequence[str]) -> dict[str, Any]:
    """Check that a payload is a dict of one format version with exactly the named fields.

    Args:
        payload: what a store's ``to_payload`` made.
        owner: the name of the state, for messages.
        version: the format version that this release reads.
        names: the names of the fields, without ``version``.

    Returns:
        The payload.

    Raises:
        ValueError: it is no dict, has another format version, or has other fields.
    """
    if not isinstance(payload, dict) or "version" not in payload:
        raise ValueError(f"{owner}: {_shown(payload)} is no saved state; {_REMEDY}")
    if type(payload["version"]) is not int or payload["version"] != version:
        raise ValueError(
            f"{owner} format version {_shown(payload['version'])}; this release of adapprox_ds "
            f"reads {version}"
        )
    if payload.keys() != {"version", *names}:
        raise ValueError(
            f"{owner} has the fields {_shown(sorted(map(str, payload)))}; allowed: "
            f"{sorted({'version', *names})}; {_REMEDY}"
        )
    return payload


def items(value: Any, name: str, count: int | None = None) -> list[Any]:
    """The items of a list or tuple.

    Raises:
        ValueError: the value is neither, or has another number of items than ``count``.
    """
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        raise _wrong(name, value, f"{'some' if count is None else count} items")
    return list(value)


def integers(value: Any, name: str, count: int | None = None, least: int = 0) -> tuple[int, ...]:
    """A list or tuple of integers, each at least ``least``.

    Raises:
        ValueError: the value is something else.
    """
    return tuple(integer(item, name, least) for item in items(value, name, count))


def triple(value: Any, name: str) -> tuple[int, int, int]:
    """Three integers, as :func:`integers` takes them."""
    a, b, c = integers(value, name, 3)
    return a, b, c


def integer(value: Any, name: str, least: int = 0, most: int = _MOST) -> int:
    """An integer in [least, most].

    Raises:
        ValueError: the value is something else.
    """
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"an integer from {least} to {most}")
    return value


def number(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number in [least, most].

    Raises:
        ValueError: the value is something else.
    """
    if type(value) not in (int, float) or not least <= value <= most or math.isinf(value):
        raise _wrong(name, value, f"a finite number from {least} to {most}")
    return float(value)


def tensor(value: Any, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """A plain dense tensor of the given shape and one of the given dtypes.

    Returns:
        The tensor, made contiguous.

    Raises:
        ValueError: the value is something else.
    """
    # Subclasses are refused, as they need not have memory of their own that a kernel could read.
    if type(value) is not Tensor:
        raise _wrong(name, value, "a plain tensor")
    if value.layout != torch.strided or value.is_conj() or value.is_neg():
        raise _wrong(name, f"a {value.layout} tensor or a lazy negative", "dense elements")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} where {tuple(shape)} fits; {_REMEDY}"
        )
    if value.dtype not in dtypes:
        raise ValueError(
            f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, dtypes))}; {_REMEDY}"
        )
    return value.contiguous()


def matrix_shape(value: Any, name: str) -> tuple[int, int]:
    """The shape of a tensor of two dimensions.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dim() != 2:
        raise _wrong(name, value, "a tensor of two dimensions")
    return value.shape[0], value.shape[1]


def seal(value: Any) -> int:
    """A checksum of everything in a payload except the elements of its tensors."""
    return zlib.crc32(repr(_canonical(value)).encode())


def _canonical(value: Any) -> Any:
    """A value in a form whose ``repr`` is the same after saving and loading.

    Lists become tuples, floats their bits, and tensors their shapes and dtypes.
    """
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype))
    if isinstance(value, Mapping):
        return tuple((str(k), _canonical(value[k])) for k in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return tuple(_canonical(item) for item in value)
    if isinstance(value, float):
        return value.hex()
    return value


def _wrong(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} is {_shown(value)}; allowed: {allowed}; {_REMEDY}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
