# SPDX-License-Identifier: Apache-2.0
"""Refuses an optimizer's unknown arguments, and those of torch.optim that it does not support."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

#: The remedy for arguments that ask an optimizer to clip gradients.
CLIPPING = 'set "gradient_clipping" in the DeepSpeed config instead'


#: The similarity, by ``difflib``, from which on a group's key is taken for a misspelt setting.
_MISSPELT = 0.85
#: The keys that torch itself has in every group.
_OF_TORCH = ("params", "param_names")


@dataclass(frozen=True, slots=True)
class Refusals:
    """The arguments that one optimizer refuses.

    Attributes:
        owner: the optimizer's name.
        remedies: for each refused argument of torch.optim and DeepSpeed, what to do instead. The
            values False and None are accepted.
        allowed: the names of the optimizer's own arguments.
    """

    owner: str
    remedies: Mapping[str, str]
    allowed: tuple[str, ...]

    def unknown(self, arguments: Mapping[str, object]) -> None:
        """Raise for arguments that the optimizer does not have.

        Raises:
            ValueError: it is an argument of torch.optim or DeepSpeed that is not supported; the
                message names the remedy.
            TypeError: it has any other name; the message has the most similar one and all others.
        """
        for name, value in arguments.items():
            if name in self.remedies:
                if value is None or value is False:
                    continue
                raise ValueError(
                    f"{self.owner}: {name}={value!r} is not supported: {self.remedies[name]}"
                )
            close = difflib.get_close_matches(name, self.allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(
                f"{self.owner}: unknown parameter {name}={value!r}; {hint}allowed: "
                f"{', '.join(self.allowed)}"
            )

    def in_group(self, group: Mapping[str, object]) -> None:
        """Raise for keys of a parameter group that look like settings but would have no effect.

        Other keys are accepted, since DeepSpeed, schedulers and users keep keys of their own in
        groups, such as ``max_momentum``.

        Raises:
            ValueError: the key is a refused argument; the message names the remedy.
            TypeError: the key is nearly that of a setting; the message names the setting.
        """
        self.unknown({name: value for name, value in group.items() if name in self.remedies})
        if "preset" in group and "preset" in self.allowed:
            raise ValueError(
                f"{self.owner}: preset={group['preset']!r} in a parameter group is not supported: "
                "give it to the constructor, and the group's own settings by name"
            )
        for name, value in group.items():
            near = difflib.get_close_matches(str(name), self.allowed, n=1, cutoff=_MISSPELT)
            if near and name not in (*self.allowed, *_OF_TORCH):
                raise TypeError(
                    f"{self.owner}: unknown key {name!r}={value!r} in a parameter group; did you "
                    f"mean {near[0]!r}? Other keys of your own may stay"
                )


def refuse_sparse(owner: str, grad: Tensor) -> None:
    """Raise for a gradient that is not strided.

    Raises:
        RuntimeError: names the remedy.
    """
    if grad.is_sparse:
        raise RuntimeError(
            f"{owner}: sparse gradients are not supported; build the embedding with "
            "sparse=False and leave sparse_gradients out of the DeepSpeed config"
        )
