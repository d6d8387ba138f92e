# SPDX-License-Identifier: Apache-2.0
"""The wrapped optimizers inside MatrixViews: their parameters, their settings and their state.

MatrixViews is the outer optimizer here, and an instance of a wrapped class an inner one. A tensor
of the outer optimizer, which is a parameter or one of ZeRO's flat shards, is split into pieces. A
piece has a leaf tensor that exists as long as the piece, so that the inner optimizer can keep its
state by it. Only during a step is that leaf a view of the outer tensor: at any other time DeepSpeed
may move, free or replace the storage of the shard and of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adapprox_ds.core.layout import ShardLayout, matrix_shape

#: The roles of the two classes: the one steps matrices, the other vectors.
MATRICES, VECTORS = "matrices", "vectors"

#: The keys of the outer optimizer's state of a tensor; see :meth:`Unit._store`.
STATE_KEYS = {"classes", "spans", "pieces", "options"}
#: With the scope "matrix" there are also the scope and the length of the shard.
WHOLE_KEYS = STATE_KEYS | {"scope", "numel"}


class Piece:
    """A matrix or vector that an inner optimizer steps.

    Attributes:
        tensor: the parameter or shard that it is a part of.
        span: its offset there and its shape: (offset, length) or (offset, rows, columns).
        param: the inner optimizer's parameter: ``tensor`` itself, or a leaf that is a view of it.
    """

    def __init__(self, tensor: Tensor, offset: int, shape: Sequence[int]) -> None:
        self.tensor, self.span = tensor, (offset, *shape)
        self.param = tensor
        if tuple(shape) != tuple(tensor.shape):
            self.param = torch.nn.Parameter(tensor.detach().new_empty(0))

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return len(self.span) == 3

    def bind(self) -> None:
        """Let ``param`` and its gradient view those of the tensor."""
        if self.param is not self.tensor:
            self.param.data = self._view(self.tensor.detach())
            if self.tensor.grad is not None:
                self.param.grad = self._view(self.tensor.grad)

    def release(self) -> None:
        """Drop both views, so that DeepSpeed can free the tensors."""
        if self.param is not self.tensor:
            self.param.grad = None
            self.param.data = self.param.data.new_empty(0)

    def _view(self, whole: Tensor) -> Tensor:
        offset, *shape = self.span
        return whole.reshape(-1)[offset : offset + math.prod(shape)].view(shape)


def cut(tensor: Tensor, layout: ShardLayout, whole: bool) -> list[Piece]:
    """The pieces of a tensor, in the order of their offsets.

    A parameter is one piece: itself, or its most nearly square 2-D view where it has more than two
    dimensions. In a shard, blocks are matrices and dense runs are vectors.

    Args:
        tensor: a parameter or a shard.
        layout: its layout.
        whole: whether it is a parameter.

    Raises:
        ValueError: a parameter of more than two dimensions is not contiguous.
    """
    if not whole:
        blocks = [(block.offset, block.rows, block.cols) for block in layout.blocks]
        runs = [(run.offset, run.numel) for run in layout.runs]
        return [Piece(tensor, offset, shape) for offset, *shape in sorted([*blocks, *runs])]
    view = matrix_shape(tensor.shape) if tensor.dim() > 2 else None
    if view is None:
        return [Piece(tensor, 0, tensor.shape)]
    if not tensor.is_contiguous():
        raise ValueError(
            f"MatrixViews: parameter {layout.fragments[0].fragment.name!r} has shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}, which no matrix views; allowed: "
            "contiguous parameters"
        )
    return [Piece(tensor, 0, view)]


@dataclass(frozen=True)
class Role:
    """A wrapped optimizer class, for matrices or for vectors.

    Attributes:
        cls: the class.
        args: the arguments of its constructor.
        defaults: the ``defaults`` of an instance with these arguments.
    """

    cls: type[Optimizer]
    args: dict[str, Any]
    defaults: dict[str, Any]

    @classmethod
    def of(
        cls, kind: Any, args: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], what: str
    ) -> Role:
        """Check a class and its arguments by making an instance for small matrices.

        Args:
            kind: the class.
            args: its arguments.
            groups: the settings of each parameter group.
            what: the name of MatrixViews' argument that the class is from.

        Raises:
            TypeError: it is no optimizer class.
            Exception: whatever the class raises for its arguments.
        """
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            raise TypeError(
                f"MatrixViews: {what}={kind!r} is not allowed; allowed: a subclass of "
                "torch.optim.Optimizer"
            )
        zeros = torch.zeros(2, 2, dtype=torch.float32, device="cpu")
        probe = [{**group, "params": [torch.nn.Parameter(zeros.clone())]} for group in groups]
        return cls(kind, dict(args), dict(kind(probe, **args).defaults))


def differs(a: Any, b: Any) -> bool:
    """Whether two settings differ; a tensor differs from every other tensor."""
    if a is b:
        return False
    return isinstance(a, Tensor) or isinstance(b, Tensor) or bool(a != b)


def role_of(classes: Mapping[str, Any], only_vectors: bool, is_matrix: bool) -> str:
    """The role of the class that steps a piece.

    Args:
        classes: the wrapped classes, or their names, by role.
        only_vectors: whether the piece's group has ``"vectors": True``.
        is_matrix: whether the piece is 2-D.
    """
    return VECTORS if VECTORS in classes and (only_vectors or not is_matrix) else MATRICES


class Inner:
    """An inner optimizer: an instance of a wrapped class, and the pieces that it steps.

    It has a group for each outer group that has pieces for it. A setting is copied from the outer
    group only when it changes there, and not at every step, since some classes change settings of
    their groups themselves, such as a step count.

    Args:
        role: the class.
        shares: its pieces, by the index of the outer group.
        options: the settings of each outer group for this class.
    """

    def __init__(
        self, role: Role, shares: Mapping[int, list[Piece]], options: Sequence[Mapping[str, Any]]
    ) -> None:
        self.shares = shares
        self._seen = {place: dict(options[place]) for place in shares}
        groups = [
            {**self._seen[place], "params": [piece.param for piece in pieces]}
            for place, pieces in shares.items()
        ]
        self.optimizer = role.cls(groups, **role.args)

    def follow(self, options: Sequence[Mapping[str, Any]]) -> None:
        """Copy settings that changed in the outer groups.

        Args:
            options: the settings of each outer group for this class.
        """
        for place, group in zip(self.shares, self.optimizer.param_groups, strict=True):
            seen = self._seen[place]
            for key, value in options[place].items():
                if key not in seen or differs(seen[key], value):
                    group[key] = seen[key] = value

    def own_options(self) -> dict[int, dict[str, Any]]:
        """The settings that the class itself added or changed, such as a step count.

        Returns:
            The settings by name, for each index of an outer group.
        """
        return {
            place: {
                key: value
                for key, value in group.items()
                if key != "params"
                and (key not in self._seen[place] or differs(self._seen[place][key], value))
            }
            for place, group in zip(self.shares, self.optimizer.param_groups, strict=True)
        }

    def restore(
        self, states: Mapping[Tensor, Any], own_options: Mapping[int, Mapping[str, Any]]
    ) -> None:
        """Load a saved state by the class's own ``load_state_dict``.

        Args:
            states: the class's state of each piece, by the piece's ``param``.
            own_options: see :meth:`own_options`.
        """
        indices = count()
        groups, state = [], {}
        for (place, pieces), group in zip(
            self.shares.items(), self.optimizer.param_groups, strict=True
        ):
            members = []
            for piece in pieces:
                members.append(next(indices))
                if piece.param in states:
                    state[members[-1]] = states[piece.param]
            groups.append({**group, **own_options.get(place, {}), "params": members})
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for place, group in zip(self.shares, self.optimizer.param_groups, strict=True):
            # load_state_dict copies settings, but a scheduler may change a learning rate that is a
            # tensor in place, so the group gets the outer group's own objects again.
            own = own_options.get(place, {})
            group.update((k, v) for k, v in self._seen[place].items() if k not in own)


class Unit:
    """Tensors that are always stepped together, and the inner optimizers of their pieces.

    Args:
        tensors: for each outer group its tensors.
        pieces: the pieces of each tensor.
        roles: the classes by role: MATRICES, and VECTORS if vectors have a class of their own.
        options: for each outer group the settings of each role.
        only_vectors: for each outer group whether its matrices go to the class for vectors too.
        state: the outer optimizer's state; what it has of the tensors is restored.
        scope: "partition" or "matrix".

    Raises:
        RuntimeError: the state is of other classes, of another scope or partition, or of another
            optimizer.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[Tensor]],
        pieces: Mapping[Tensor, list[Piece]],
        roles: Mapping[str, Role],
        options: Sequence[Mapping[str, Mapping[str, Any]]],
        only_vectors: Sequence[bool],
        state: Mapping[Tensor, Mapping[str, Any]],
        scope: str = "partition",
    ) -> None:
        self._tensors, self._pieces, self._scope = tensors, pieces, scope
        self._classes = {name: role.cls.__name__ for name, role in roles.items()}
        self._role_of: dict[Tensor, str] = {}
        shares: dict[str, dict[int, list[Piece]]] = {name: {} for name in roles}
        for place, group in enumerate(tensors):
            for piece in (piece for tensor in group for piece in pieces[tensor]):
                name = role_of(roles, only_vectors[place], piece.is_matrix)
                self._role_of[piece.param] = name
                shares[name].setdefault(place, []).append(piece)
        with self._bound():
            try:
                self._inners = {
                    name: Inner(roles[name], share, [o[name] for o in options])
                    for name, share in shares.items()
                    if share
                }
            except ValueError as error:
                if VECTORS in roles or all(p.is_matrix for own in pieces.values() for p in own):
                    raise
                raise ValueError(
                    f"MatrixViews: {self._classes[MATRICES]} refuses what is no matrix ({error}); "
                    "give vectors=, a class for it, such as vectors=torch.optim.AdamW"
                ) from error
            self._restore(state)

    def step(
        self,
        options: Sequence[Mapping[str, Mapping[str, Any]]],
        state: dict[Tensor, Any],
    ) -> None:
        """Step the inner optimizers, and put their state into the outer optimizer's.

        Args:
            options: for each outer group the settings of each role.
            state: the outer optimizer's state.
        """
        for tensor in self._pieces:
            self._require_ours(tensor, state.get(tensor))
        with self._bound():
            for name, inner in self._inners.items():
                inner.follow([o[name] for o in options])
                inner.optimizer.step()
        self._store(state)

    @contextmanager
    def _bound(self) -> Iterator[None]:
        pieces = [piece for own in self._pieces.values() for piece in own]
        try:
            for piece in pieces:
                piece.bind()
            yield
        finally:
            for piece in pieces:
                piece.release()

    def _store(self, state: dict[Tensor, Any]) -> None:
        """Put the inner optimizers' state into the outer optimizer's.

        That of a tensor is a dict of ``classes``, their names by role; ``spans`` and ``pieces``,
        the span and the state of each piece; and ``options``, the :meth:`Inner.own_options` of the
        tensor's group by role. The states are the inner optimizers' own dicts, not copies.

        Args:
            state: the outer optimizer's state.
        """
        own = {name: inner.own_options() for name, inner in self._inners.items()}
        for place, group in enumerate(self._tensors):
            options = {name: places[place] for name, places in own.items() if place in places}
            for tensor in group:
                if tensor.grad is None and not state.get(tensor):
                    continue
                pieces = self._pieces[tensor]
                state[tensor] = {
                    "classes": self._classes,
                    "spans": [piece.span for piece in pieces],
                    "pieces": [
                        self._inners[self._role_of[p]].optimizer.state.get(p, {})
                        for p in (piece.param for piece in pieces)
                    ],
                    "options": options,
                }
                if self._scope == "matrix":
                    state[tensor] |= {"scope": self._scope, "numel": tensor.numel()}

    def _restore(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        states: dict[Tensor, Any] = {}
        own: dict[str, dict[int, Any]] = {name: {} for name in self._inners}
        for place, group in enumerate(self._tensors):
            for tensor in group:
                if not (saved := state.get(tensor)):
                    continue
                self._require_ours(tensor, saved)
                for piece, held in zip(self._pieces[tensor], saved["pieces"], strict=True):
                    if held:
                        states[piece.param] = held
                for name, options in saved["options"].items():
                    own[name][place] = options
        for name, inner in self._inners.items():
            if states or own[name]:
                inner.restore(states, own[name])

    def _require_ours(self, tensor: Tensor, saved: Mapping[str, Any] | None) -> None:
        """Raise unless a saved state, if there is one, fits this unit.

        Args:
            tensor: the parameter or shard.
            saved: the outer optimizer's state of it; None or empty where there is none.

        Raises:
            RuntimeError: it is of other classes, of another scope or partition, or of another
                optimizer.
        """
        if not saved:
            return
        if set(saved) not in (STATE_KEYS, WHOLE_KEYS):
            raise RuntimeError(
                f"MatrixViews: the state of a tensor holds {sorted(saved)}: it comes from another "
                "optimizer or DeepSpeed's loader of universal checkpoints; allowed: a checkpoint "
                "that MatrixViews saved, or adapprox_ds.load_universal"
            )
        if saved["classes"] != self._classes:
            raise RuntimeError(
                f"MatrixViews: the loaded state is of {saved['classes']}; allowed here: "
                f"{self._classes}"
            )
        if (theirs := saved.get("scope", "partition")) != self._scope:
            raise RuntimeError(
                f"MatrixViews: the loaded state is of scope={theirs!r} and this optimizer has "
                f"scope={self._scope!r}; allowed: resume with the scope that it was saved with"
            )
        spans = [piece.span for piece in self._pieces[tensor]]
        if [tuple(span) for span in saved["spans"]] != spans:
            raise RuntimeError(
                f"MatrixViews: the loaded state is of {len(saved['spans'])} pieces where this "
                f"tensor has {len(spans)}, or they lie elsewhere: it was saved with another model, "
                "world size, ZeRO stage or parameter order. Resume with the same ones"
                + (", or through a universal checkpoint" if self._scope == "matrix" else "")
            )
