# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that tests open pages in, where the machine has one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find() -> str:
    """Its command; skips the test where there is none."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")


def opened(
    address: str, scratch: Path, *, arguments: Iterable[str] = (), milliseconds: int = 3000
) -> tuple[str, list[str]]:
    """The page as it is once its scripts have run, and what it wrote to the console.

    Args:
        address: of the page; no other host can be reached.
        scratch: a folder for the browser's own files.
        arguments: more for the browser.
        milliseconds: of the page's own clock, which does not wait for nothing to happen.
    """
    done = subprocess.run(
        [
            find(),
            "--headless",
            "--no-sandbox",  # as root, in containers
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={scratch}",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--virtual-time-budget={milliseconds}",
            *arguments,
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)
