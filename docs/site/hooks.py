# SPDX-License-Identifier: Apache-2.0
"""Brings the repository's own Markdown files, and what they link to, into the site."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

from adapprox_ds.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/*.md", "docker/*.md", "examples/*/*.md", "examples/*/data/*.md")
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages under the paths that they have in the repository, and the files they show."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    shown = {
        target
        for page in pages
        for _, link, _ in LINK.findall(page.read_text("utf-8"))
        if (target := (page.parent / link).resolve()).is_file() and target.suffix != ".md"
    }
    for path in [*pages, *sorted(shown)]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to folders to their READMEs, begin with a title, and fill in commands' help."""
    here = PurePosixPath(page.file.src_uri).parent
    if page.file.src_uri.startswith("reference/"):
        return re.sub(r"^<!-- help: (.*?) -->$", _help, markdown, flags=re.MULTILINE)

    def to_readme(found: re.Match[str]) -> str:
        target = ROOT / here / found[2]
        link = f"{found[2].rstrip('/')}/README.md" if target.is_dir() else found[2]
        return f"{found[1]}{link}{found[3]}"

    parts = FENCE.split(markdown)
    # Some pages begin with a heading of the second level; a page of a site has one of the first.
    first = re.search(r"^(#+) ", parts[0], re.MULTILINE)
    surplus = len(first[1]) - 1 if first else 0
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(to_readme, parts[i])
        parts[i] = re.sub(rf"^#{{{surplus}}}(?=#+ )", "", parts[i], flags=re.MULTILINE)
    return "".join(parts)


def _help(found: re.Match[str]) -> str:
    """What a command prints with --help."""
    os.environ["COLUMNS"] = "96"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*found[1].split(), "--help"])
    return f"```text\n{printed.getvalue()}```"
