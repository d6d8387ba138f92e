# SPDX-License-Identifier: Apache-2.0
"""BERT's task: windows with some tokens hidden, by the seed and the window's position alone."""

import zlib

import torch

from sampling import WindowSampler

MASKED_FRACTION = 0.15
HIDDEN, RANDOM = 0.8, 0.1  # of the masked tokens; the others stay as they are
IGNORED = -100  # the target of a token that is not masked


class MaskedWindowSampler:
    """Serves the windows of a ``WindowSampler`` with masks, new ones each epoch.

    Args:
        windows: Where the windows come from.
        pieces: Of the tokenizer; random tokens are drawn from them.
        mask_id: Token that stands for a hidden one.
        seed: Of the masks.
    """

    def __init__(self, windows: WindowSampler, pieces: int, mask_id: int, seed: int) -> None:
        self._windows = windows
        self._pieces = pieces
        self._mask_id = mask_id
        self._seed = seed

    def __len__(self) -> int:
        """Windows in one epoch."""
        return len(self._windows)

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Serves windows ``first`` to ``first + size`` of the endless shuffled sequence.

        Returns:
            Inputs, and as targets the masked tokens and ``IGNORED`` elsewhere; each
            ``(size, T)``.
        """
        windows, _ = self._windows.batch(first, size)
        pairs = [self._mask(window, first + row) for row, window in enumerate(windows)]
        inputs, targets = zip(*pairs, strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def _mask(self, window: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {index}".encode()))
        # An equal count in every window: a mean over micro-batches is then one over tokens.
        count = max(1, round(MASKED_FRACTION * window.numel()))
        chosen = torch.randperm(window.numel(), generator=generator)[:count]
        fate = torch.rand(count, generator=generator)
        others = torch.randint(self._pieces, (count,), generator=generator)
        masked = torch.where(fate < HIDDEN + RANDOM, others, window[chosen])
        masked = torch.where(fate < HIDDEN, self._mask_id, masked)
        targets = torch.full_like(window, IGNORED).index_put((chosen,), window[chosen])
        return window.index_put((chosen,), masked), targets
