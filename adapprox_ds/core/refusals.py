# SPDX-License-Identifier: Apache-2.0
"""Arguments that are refused: unknown ones, and torch.optim's that an optimizer cannot honour."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

#: What to do instead of clipping gradients in an optimizer.
CLIPPING = 'set "gradient_clipping" in the DeepSpeed config instead'


#: How alike, by ``difflib``, a key of a group and a setting have to be for a misspelling.
_MISSPELT = 0.85
#: What torch itself has in every group.
_OF_TORCH = ("params", "param_names")


@dataclass(frozen=True, slots=True)
class Refusals:
    """What one optimizer refuses.

    Attributes:
        owner: the optimizer's name.
        remedies: arguments of torch.optim and DeepSpeed that are refused, with what to do. False
            and None pass.
        allowed: names of the optimizer's own arguments.
    """

    owner: str
    remedies: Mapping[str, str]
    allowed: tuple[str, ...]

    def unknown(self, arguments: Mapping[str, object]) -> None:
        """Raise for arguments that the optimizer does not have.

        Raises:
            ValueError: an argument of torch.optim or DeepSpeed that cannot be honoured; names the
                remedy.
            TypeError: any other name; names the closest known one and all that are allowed.
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
        """Raise for keys of a parameter group that look like settings but would not be honoured.

        Other keys pass: DeepSpeed, schedulers and users keep their own there, such as
        ``max_momentum``. Only what is as near to a setting as a slip of the keyboard is refused.

        Raises:
            ValueError: names the key and the remedy.
            TypeError: the key is a misspelt setting; names the setting.
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
