# SPDX-License-Identifier: Apache-2.0
"""The pages in docs/ that no test of their own executes: code, names, messages, links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapprox_ds.__main__ import main
from tests.settings_table import PAGE, written

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def text(name: str) -> str:
    return (DOCS / name).read_text()


def test_the_table_of_hyper_parameters_is_what_the_fields_say() -> None:
    """``python -m tests.settings_table`` writes it."""
    assert PAGE.read_text() == written(PAGE.read_text())


def test_hyper_parameters_code_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text("hyper-parameters.md"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean_rank=" in done.stdout


@pytest.mark.parametrize("name", ["limits.md", "memory.md"])
def test_pages_show_what_their_commands_print(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.findall(
        r"```bash\npython -m adapprox_ds (.*?)\n```\n+```text\n(.*?)```", text(name), re.DOTALL
    )
    assert shown
    for command, output in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == output


def test_messages_are_those_of_the_code() -> None:
    """The first column of the troubleshooting page."""
    source = "\n".join(path.read_text() for path in (ROOT / "adapprox_ds").rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| ", text("troubleshooting.md"), re.MULTILINE)
    parts = [part for row in rows for part in re.findall(r"`(.*?)`", row)]
    assert len(rows) > 10
    assert [part for part in parts if part not in source] == []


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []
