# SPDX-License-Identifier: Apache-2.0
"""The table of docs/hyper-parameters.md, made of the settings' fields and the class's docstring.

``python -m tests.settings_table`` writes it into the page.
"""

from __future__ import annotations

import ast
import inspect
import re

from adapprox_ds import Adapprox
from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.core.rules import Setting
from tests import ROOT

PAGE = ROOT / "docs" / "hyper-parameters.md"
HEAD = "| name | default | allowed | what it is, and when to change it | source |"


def documented(cls: type[ShardOptimizer]) -> dict[str, tuple[str, str]]:
    """What a class's docstring says of each argument, and of its default in the last sentence."""
    section = (inspect.getdoc(cls) or "").split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    plain = {name: " ".join(text.split()).replace("``", "`") for name, text in entries}
    split = {name: text.removesuffix(".").partition(" Default ") for name, text in plain.items()}
    return {name: (said, default) for name, (said, _, default) in split.items()}


def agrees(default: str, known: Setting) -> bool:
    """Whether a docstring's words on a default are what the setting has."""
    if known.default is None:
        return bool(default) and default.startswith(meaning_of_none(known))
    return bool(ast.literal_eval(default) == known.default)


def meaning_of_none(known: Setting) -> str:
    """As the message on a refused value says it."""
    return known.allowed.partition("or None for ")[2]


def row(name: str, known: Setting, said: str, default: str) -> str:
    """The line of a setting."""
    if known.default is None and default != meaning_of_none(known):
        said += f" By default {default}."
    said = re.sub(r"\bdocs/([\w-]+)(\.md[#\w-]*)", r"[\1](\1\2)", said)
    said = re.sub(r":\w+:(`\w+`)", r"\1", said)
    allowed = re.sub(r"one of \((.*?)\)", r"\1", known.allowed).replace("'", '"')
    shown = f'"{known.default}"' if isinstance(known.default, str) else known.default
    return f"| `{name}` | {shown} | {allowed} | {said} | {known.source} |\n"


def written(page: str) -> str:
    """The page with the table as it should be."""
    said = documented(Adapprox)
    declared = Adapprox.settings_class.declared().items()
    rows = [row(name, known, *said[name]) for name, known in declared]
    start = page.index("| name | default |")
    end = page.index("\n\n", start) + 1
    return f"{page[:start]}{HEAD}\n|---|---|---|---|---|\n{''.join(rows)}{page[end:]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
