# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that tests open pages in, where the machine has one.

It is spoken to in its DevTools protocol, over a pair of pipes (``--remote-debugging-pipe``).
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_PATIENCE_S = 60


def command() -> str:
    """Of the browser; skips the test where there is none."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")


class Page:
    """A page that is open.

    Attributes:
        problems: errors of its scripts, and what they and the browser complained about.
        requests: addresses of everything that it asked for.
    """

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self.process, self._send, self._receive = process, send, receive
        self._count, self._buffer, self._session = 0, b"", ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str, *, dark: bool = False, width: int = 1300) -> None:
        """Load a page until it is complete."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({json.dumps(address.partition('#')[0])})")
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The expression's value, once that is true."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} did not become true"
            time.sleep(0.05)
        return value

    def move_to(self, x: float, y: float) -> None:
        """Move the pointer, in CSS pixels from the window's upper left corner."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        """The next message; what is no answer is noted."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], _PATIENCE_S)
            data = os.read(self._receive, 1 << 16) if ready else b""
            assert data, f"the browser does not answer; its exit code: {self.process.poll()}"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        match message.get("method"), message.get("params", {}):
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.problems.append(json.dumps(details))
            case "Log.entryAdded", {"entry": {"level": "error" | "warning"} as entry}:
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")
            case "Runtime.consoleAPICalled", {"type": "error" | "warning", "args": values}:
                self.problems.append(json.dumps(values))
            case "Network.requestWillBeSent", {"request": {"url": url}}:
                self.requests.append(url)
        return message


@contextmanager
def browser(scratch: Path) -> Iterator[Page]:
    """A page of a browser whose own files are in ``scratch``; it can reach no other host."""
    (theirs, send), (receive, answers) = os.pipe(), os.pipe()
    arguments = [
        "--headless",
        "--no-sandbox",  # it refuses to run as root with one
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={scratch}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--remote-debugging-pipe",  # it reads 3 and writes 4
    ]
    script = f'exec "$@" 3<&{theirs} 4>&{answers}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", command(), *arguments],
        pass_fds=(theirs, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(answers)
    try:
        yield Page(process, send, receive)
    finally:
        process.kill()
        process.wait()
        os.close(send)
        os.close(receive)
