# SPDX-License-Identifier: Apache-2.0
"""Sentences that are for or against something, and their split."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

LEAST_RATING = 0.5  # closer to 0 the raters did not agree on a side
HELD_OUT_OF = 10  # one text in so many is held out


@dataclass(frozen=True)
class Snippet:
    """One sentence.

    Attributes:
        text: As it was written.
        label: 1 where it is positive, 0 where it is negative.
    """

    text: str
    label: int


def read_snippets(path: Path) -> list[Snippet]:
    """Reads ``id TAB mean rating TAB text`` a line, without the lines rated near 0.

    Raises:
        ValueError: A line is not of that form; names it.
    """
    snippets = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            _, rating, text = line.strip().split("\t")
            value = float(rating)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected 'id TAB rating TAB text', found {line[:80]!r}"
            ) from None
        if abs(value) >= LEAST_RATING:
            snippets.append(Snippet(text, int(value > 0)))
    return snippets


def split_snippets(snippets: list[Snippet]) -> tuple[list[Snippet], list[Snippet]]:
    """Splits by a hash of the text: whatever the order and the rest, a text stays on its side.

    Returns:
        Training and held-out snippets.

    Raises:
        ValueError: One of them is empty.
    """
    train: list[Snippet] = []
    held_out: list[Snippet] = []
    for snippet in snippets:
        digest = hashlib.sha256(snippet.text.encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") % HELD_OUT_OF == 0
        (held_out if is_held_out else train).append(snippet)
    if not train or not held_out:
        raise ValueError(
            f"{len(snippets)} sentences are too few: {len(train)} to train on, "
            f"{len(held_out)} held out"
        )
    return train, held_out
