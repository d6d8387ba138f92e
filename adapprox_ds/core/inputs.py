# SPDX-License-Identifier: Apache-2.0
"""Turns parameters and gradients into the dense 1-D tensors that kernels take, or refuses them.

A tensor can be a view with any strides, of the imaginary parts of complex numbers, or of one
element many times. A kernel computes addresses, and would read and write what lies between the
elements. Tensors whose elements do not lie in memory of their own are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapprox_ds.core.layout import ShardLayout


def as_flat(x: Tensor) -> Tensor:
    """All elements of a tensor in their logical order, as a dense 1-D tensor.

    Args:
        x: a tensor of any shape and strides, with or without torch's conjugate or negative bit.

    Returns:
        A detached, contiguous tensor (numel,) without these bits: a view of ``x`` if there is one,
        otherwise a copy.
    """
    if x.is_contiguous() and not x.is_neg() and not x.is_conj():
        return x.detach().view(-1)
    return x.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def write_back(x: Tensor, flat: Tensor) -> None:
    """Copy the result of :func:`as_flat`, changed since, back to its argument, unless it is a view.

    Args:
        x: the tensor that was given; the memory between its elements is not touched.
        flat: the result, (numel,).
    """
    if flat.data_ptr() != x.data_ptr() or flat.is_neg() != x.is_neg():
        x.detach().copy_(flat.view(x.shape))


def refuse_unsteppable(owner: str, name: str, p: Tensor) -> None:
    """Raise for a parameter that cannot be updated in its memory.

    Args:
        owner: the optimizer's name.
        name: the parameter's name.
        p: the parameter.

    Raises:
        TypeError: it is a wrapper, such as a DTensor, whose elements lie in other tensors, or it
            has no strides; the message names the remedy.
        ValueError: several of its elements share memory; the message names the remedy.
    """
    _require_plain(owner, f"parameter {name!r}", p)
    if overlaps_itself(p):
        raise ValueError(
            f"{owner}: parameter {name!r} of shape {tuple(p.shape)} and strides {p.stride()} has "
            "several elements in the same memory; allowed: elements apart from each other. Make it "
            "of p.detach().clone(), or let the small tensor be the parameter and expand it in the "
            "model"
        )


def require_gradient(owner: str, name: str, p: Tensor) -> Tensor:
    """The gradient of a parameter or shard, if a step can use it.

    Args:
        owner: the optimizer's name.
        name: the parameter's name, or a description of the shard.
        p: the parameter or shard, which has a gradient.

    Raises:
        RuntimeError: the gradient is sparse; the message names the remedy.
        TypeError: it is a wrapper, or has no strides.
        ValueError: its shape or device is not the parameter's.
    """
    grad = p.grad
    assert grad is not None
    if grad.layout in _SPARSE:
        raise RuntimeError(
            f"{owner}: sparse gradients are not supported, and {name!r} has one; build the "
            "embedding with sparse=False and leave sparse_gradients out of the DeepSpeed config"
        )
    _require_plain(owner, f"the gradient of {name!r}", grad)
    if grad.shape != p.shape or grad.device != p.device:
        raise ValueError(
            f"{owner}: the gradient of {name!r} has shape {tuple(grad.shape)} on {grad.device} "
            f"where the parameter has {tuple(p.shape)} on {p.device}; allowed: the same. After a "
            "parameter was resized, clear its gradient and build the optimizer anew"
        )
    return grad


def require_inputs(owner: str, p: Tensor, layout: ShardLayout, whole: bool) -> Tensor:
    """The gradient of a parameter or shard, if a step can use both; nothing is changed.

    Args:
        owner: the optimizer's name.
        p: the parameter or shard, which has a gradient.
        layout: its layout.
        whole: whether it is one parameter in its own shape, rather than a flat shard.

    Raises:
        ValueError: it was resized or reshaped since the layout was made.
        RuntimeError, TypeError, ValueError: see :func:`require_gradient` and
            :func:`refuse_unsteppable`.
    """
    parts = layout.fragments
    name = parts[0].fragment.name if parts else "padding"
    # A parameter that is its own flat tensor has one fragment.
    whole = whole and len(parts) == 1 and parts[0].fragment.numel == layout.numel
    expected = parts[0].fragment.shape if whole else (layout.numel,)
    if tuple(p.shape) != expected and (p.numel() or layout.numel):
        raise ValueError(
            f"{owner}: parameter {name!r} has shape {tuple(p.shape)} where its state was made for "
            f"{expected}; allowed: one shape throughout. After resizing or reshaping, build the "
            "optimizer anew"
        )
    if not p.is_contiguous():
        refuse_unsteppable(owner, name, p)
    return require_gradient(owner, name, p)


def overlaps_itself(x: Tensor) -> bool:
    """Whether elements of a strided tensor share memory; this does not wait for a device."""
    dims = sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    if x.numel() == 0:
        return False
    reach, apart = 0, True  # the largest offset of an element, over the dimensions so far
    for step, size in dims:
        apart = apart and step > reach
        reach += step * (size - 1)
    if apart or not dims[0][0]:
        return not apart
    # The strides interlock, as no common operation makes them: mark the place of each element.
    marks = torch.zeros(reach + 1, dtype=torch.bool, device="cpu")
    marks.as_strided(x.shape, x.stride()).fill_(True)
    return int(marks.sum()) < x.numel()


_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def _require_plain(owner: str, what: str, x: Tensor) -> None:
    """Raise unless the elements of a tensor lie in its own memory, by its strides.

    Raises:
        TypeError: they do not; the message names the remedy.
    """
    # A subclass that dispatches operations itself keeps its elements in other tensors.
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{owner}: {what} is a {type(x).__name__}, whose elements lie in other tensors; "
            "allowed: plain tensors. Shard the model by DeepSpeed's ZeRO instead of fully_shard or "
            "DTensors, or give the optimizer the local tensors (to_local())"
        )
    if x.layout is not torch.strided:
        raise TypeError(
            f"{owner}: {what} has the layout {x.layout}; allowed: torch.strided. Convert it by "
            "to_dense()"
        )
