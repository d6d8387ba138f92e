# SPDX-License-Identifier: Apache-2.0
"""What processes share that run kernels in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace


def prepare() -> None:
    """Let the interpreter put its own functions into Triton's language once, and for good.

    It does so at each launch, and again at each call of a function from a kernel; to look for what
    is to be replaced takes a third of the time of small kernels.
    """
    from triton.runtime import interpreter

    language = {"tl": interpreter.tl, "core": interpreter.tl.core}
    interpreter._patch_lang(SimpleNamespace(__globals__=language))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
