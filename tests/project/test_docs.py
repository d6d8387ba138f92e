# SPDX-License-Identifier: Apache-2.0
"""The pages in docs/ that no test of their own executes: code, tables, commands, links."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from adapprox_ds.__main__ import main
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from tests.project.pages import ROOT, blocks, printed
from tests.settings_table import PAGE, written

PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_table_of_hyper_parameters_is_what_the_fields_say() -> None:
    """``python -m tests.settings_table`` writes it."""
    assert PAGE.read_text() == written(PAGE.read_text())


def test_microadams_hyper_parameters_are_all_there_with_their_defaults() -> None:
    page = (ROOT / "docs/micro-adam.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE)
    defaults = MicroHyperparameters().as_group()
    shown = {n: f'"{v}"' if isinstance(v, str) else str(v) for n, v in defaults.items()}
    assert dict(rows) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [("hyper-parameters.md", "mean_rank="), ("micro-adam.md", "WindowMetrics(step=3")],
)
def test_code_runs(name: str, shown: str) -> None:
    (block,) = blocks(f"docs/{name}", "python")
    assert shown in printed([sys.executable, "-c", block])


@pytest.mark.parametrize("name", ["limits.md", "memory.md", "micro-adam.md"])
def test_commands_print_tables_of_the_pages_rows(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words that a page's output has at the beginning of its lines; numbers may move on."""
    page = (ROOT / "docs" / name).read_text()
    pattern = r"```bash\npython -m adapprox_ds (.*?)\n```\n+```text\n(.*?)```"
    shown = re.findall(pattern, page, re.DOTALL)
    assert shown
    for command, output in shown:
        assert main(command.split()) == 0
        found = capsys.readouterr().out
        assert [row.split()[:1] for row in output.splitlines()] == [
            row.split()[:1] for row in found.splitlines()
        ]


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
