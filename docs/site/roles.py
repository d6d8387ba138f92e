# SPDX-License-Identifier: Apache-2.0
"""The docstrings' marks, ``:func:`x``` and double backticks, as Markdown with links."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
LITERAL = re.compile(r"``(.+?)``", re.DOTALL)


class Roles(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe once an object with its docstring is there."""
        if obj.docstring is None:
            return

        def link(found: re.Match[str]) -> str:
            short, name = found[1], found[2]
            shown = name.rpartition(".")[2] if short else name
            try:
                target = name if name.startswith("adapprox_ds.") else obj.resolve(name)
            except griffe.NameResolutionError:
                target = f"{obj.path}.{name}"
            # Optional: what has no page of its own is code without a link.
            return (
                f'<autoref optional identifier="{escape(target)}"><code>{escape(shown)}</code>'
                "</autoref>"
            )

        text = ROLE.sub(link, obj.docstring.value)
        obj.docstring.value = LITERAL.sub(r"`\1`", text)
