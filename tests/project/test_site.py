# SPDX-License-Identifier: Apache-2.0
"""The documentation site of ``make docs``: built strictly, whole, and read in a browser."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import adapprox_ds
from adapprox_ds.__main__ import main
from tests import ROOT
from tests.project.browser import browser

for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="the extra docs is not installed (make docs)")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site's, from a server of this machine: the search's worker wants one."""
    handler = functools.partial(_Silent, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page_of_the_repository_is_there(site: Path) -> None:
    """Its README and its docs, examples and images; all in the navigation."""
    start = (site / "index.html").read_text()
    sources = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md"), *ROOT.glob("*.md")]
    for source in sources:
        page = source.relative_to(ROOT).with_suffix(".html")
        page = page.with_name("index.html") if page.stem == "README" else page
        assert (site / page).is_file(), page
        link = page.as_posix()
        assert f'href="{link}"' in start or link == "index.html", link


def test_the_reference_holds_all_public_names(site: Path) -> None:
    """With their arguments; the docstrings' marks are no text any more."""
    pages = {page.stem: page.read_text() for page in (site / "reference").glob("*.html")}
    text = "\n".join(pages.values())
    names = [f"adapprox_ds.{name}" for name in adapprox_ds.__all__ if name != "__version__"]
    names += ["adapprox_ds.report.monitor.watch"]
    assert [name for name in names if f'id="{name}"' not in text] == []
    assert "error_threshold" in pages["optimizers"]
    assert re.findall(r":(?:func|class|meth|mod):|``", text) == []
    assert re.search(r'href="#adapprox_ds.report.runs.read_run"[^>]*><code>read_run', text)


def test_the_reference_holds_all_commands(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^ {4}(\w+)(?= |$)", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) >= 9
    text = (site / "reference" / "commands.html").read_text()
    assert [c for c in commands if f"usage: python -m adapprox_ds {c}" not in text] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)[^>]*(?:src|href)="([^"]+)"', page.read_text()
        )
        assert loaded
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", sheet.read_text())


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_a_browser_reads_it(address: str, scheme: str, tmp_path: Path) -> None:
    """Pictures and the search, in light and dark; nothing is missing."""
    dark = scheme == "slate"
    with browser(tmp_path / "browser") as shown:
        shown.open(f"{address}/index.html", dark=dark)
        assert shown.evaluate("document.querySelector('h1').textContent").startswith("adapprox_ds")
        shown.wait_for(f"document.body.dataset.mdColorScheme === '{scheme}'")
        page = "examples/paper/index.html" if dark else "docs/monitoring.html"
        shown.open(f"{address}/{page}", dark=dark)
        images = "Array.from(document.querySelectorAll('article img'))"
        assert shown.evaluate(f"{images}.length") >= 2
        # Of those further down, some are loaded only when they are scrolled to.
        shown.wait_for(f"{images}.every(i => (i.loading = 'eager') && i.naturalWidth > 0)")
        shown.open(f"{address}/index.html?q=rank_max", dark=dark)
        first = "document.querySelector('.md-search-result__item a')"
        assert "html" in shown.wait_for(f"{first} && {first}.href")
        found = shown.evaluate("document.querySelector('.md-search-result__list').textContent")
        assert "rank_max" in found
        assert shown.problems == []
        assert [url for url in shown.requests if not url.startswith((address, "data:"))] == []
