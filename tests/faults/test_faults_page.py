# SPDX-License-Identifier: Apache-2.0
"""The tests that docs/faults.md names are there."""

from __future__ import annotations

import importlib
import re

from tests import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text()


def test_every_fault_has_its_test() -> None:
    rows = re.findall(r"^\| (?!fault|-)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 12
    for row in rows:
        *_, shown = row.split(" | ")
        named = re.findall(r"`([\w/]+)\.py::(\w+)(?:\[(\w+)\])?`", shown)
        assert named or shown == "the same", row
        for path, function, case in named:
            place = path if "/" in path else f"tests/faults/{path}"
            module = importlib.import_module(place.replace("/", "."))
            assert callable(getattr(module, function)), row
            assert not case or case in module.CASES, row
