# SPDX-License-Identifier: Apache-2.0
"""Gives the texts of the complete DeepSpeed configurations that the package contains."""

from __future__ import annotations

from pathlib import Path

#: The files lie inside an installed package, and beside it in a checkout of the repository.
_FOLDERS = [parent / "ds_configs" for parent in Path(__file__).resolve().parents[1:3]]


def names() -> list[str]:
    """The names of all configurations, sorted.

    Raises:
        ValueError: the installation has none.
    """
    return sorted(path.stem for path in _folder().glob("*.json"))


def read(name: str) -> str:
    """The text of a configuration.

    Args:
        name: its name, such as "ds_adapprox", with or without ".json".

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    stem = name.removesuffix(".json")
    if stem not in names():
        raise ValueError(f"config {name!r} is not allowed; allowed: {', '.join(names())}")
    return (_folder() / f"{stem}.json").read_text("utf-8")


def _folder() -> Path:
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise ValueError(f"no ds_configs folder at {' or '.join(map(str, _FOLDERS))}: install again")
