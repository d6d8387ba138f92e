# SPDX-License-Identifier: Apache-2.0
"""What files of a checkpoint may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from adapprox_ds.checkpoint.files import CheckpointError, read


class ByName:
    """Pickles as Python before 3.11.4 does a member of an enumeration: getattr(class, name)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (ZeroStageEnum, self.name)


def test_members_of_enumerations_by_name(tmp_path: Path) -> None:
    """Of any Python; DeepSpeed's converter writes ZeRO's stage so."""
    torch.save({"by name": ByName("weights"), "plain": ZeroStageEnum.gradients}, tmp_path / "x.pt")
    found = read(tmp_path / "x.pt")
    assert found == {"by name": ZeroStageEnum.weights, "plain": ZeroStageEnum.gradients}


@pytest.mark.parametrize("name", ["__subclasses__", "mro", "__class__", "none"])
def test_nothing_else_by_name(name: str, tmp_path: Path) -> None:
    torch.save(ByName(name), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not safe to load"):
        read(tmp_path / "x.pt")
