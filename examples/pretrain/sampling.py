# SPDX-License-Identifier: Apache-2.0
"""Windows of a token stream, in an order that depends on the seed and the position alone.

Nothing is kept between batches, so a resumed run sees exactly the batches it would have seen,
and a different number of ranks sees the same global batches if their size is the same.
"""

import torch


class WindowSampler:
    """Cuts a token stream into windows and serves them, shuffled anew each epoch.

    Args:
        tokens: The stream, 1-D.
        length: Tokens a model input, ``T``; a window is ``T + 1`` tokens and shares its last one
            with the next window.
        seed: Of the order.

    Raises:
        ValueError: The stream is shorter than one window.
    """

    def __init__(self, tokens: torch.Tensor, length: int, seed: int) -> None:
        if tokens.numel() <= length:
            raise ValueError(
                f"{tokens.numel()} tokens are fewer than one window of {length} + 1; "
                "use more text or a model with a shorter context"
            )
        self._windows = tokens.unfold(0, length + 1, length)
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Windows in one epoch."""
        return self._windows.shape[0]

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Serves windows ``first`` to ``first + size`` of the endless shuffled sequence.

        Returns:
            Inputs and next-token targets, each ``(size, T)``.
        """
        windows = torch.stack([self._window(index) for index in range(first, first + size)])
        return windows[:, :-1], windows[:, 1:]

    def _window(self, index: int) -> torch.Tensor:
        epoch, position = divmod(index, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
        return self._windows[self._order[position]]
