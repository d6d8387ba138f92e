# SPDX-License-Identifier: Apache-2.0
"""What a window and an error must be after they moved to another partition."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.methods import BLOCKS


def cut_pieces(begins: Tensor, size: int) -> Tensor:
    """Of a flattened parameter, the elements of pieces of a size that a fragment begins inside."""
    inside = begins.nonzero().flatten()
    cut = torch.zeros(-(-len(begins) // size), dtype=torch.bool)
    cut[inside[inside % size != 0] // size] = True
    return cut.repeat_interleave(size)[: len(begins)]


def compare_window(name: str, found: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """To the bit but for cut blocks, whose smallest entries may go, and groups put together."""
    block, group = BLOCKS["block_size"], BLOCKS["quant_block_size"]
    cut = cut_pieces(saved["begins"], block) | cut_pieces(found["begins"], block)
    for key in ("exp_avg", "v"):
        assert torch.equal(found[key][~cut], saved[key][~cut]), f"{key} of {name}"
        kept = found[key][cut] == saved[key][cut]
        # Of parameters that are shorter than a block half of the few entries may go.
        few = len(cut) < block or not len(kept)
        assert few or kept.float().mean() > 0.7, f"{key} of {name}"
    joined = cut_pieces(saved["begins"], group)
    assert torch.equal(found["error"][~joined], saved["error"][~joined]), f"error of {name}"
    if joined.any():
        widest = float(saved["error"].max() - saved["error"].min()) / 15
        assert (found["error"] - saved["error"]).abs().max() <= 0.51 * widest, f"error of {name}"
