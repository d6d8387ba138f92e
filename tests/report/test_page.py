# SPDX-License-Identifier: Apache-2.0
"""``python -m adapprox_ds report``: what is in the page, read as text and by a browser."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adapprox_ds.__main__ import main
from adapprox_ds.report.page import page
from adapprox_ds.report.runs import Curve, Run
from adapprox_ds.report.svg import Line, heat_map, line_chart
from recording import RunRecorder
from tests.project.browser import browser
from tests.report.run_folders import learning_rates, monitored, pretraining

SUMMARY = {"adamw_state_bytes": 400, "config": "<ours>.json", "versions": {"torch": "2.0"}}


class Reader(HTMLParser):
    """Finds tags that are not closed, and everything that points elsewhere."""

    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pointers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.pointers += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def charts(text: str) -> dict[str, dict[str, Any]]:
    """The numbers behind each chart of lines, by its title."""
    found = {}
    for figure in re.findall(r"<figure>.*?</figure>", text):
        title = re.findall(r"<figcaption>(.*?)(?: <small|</fig)", figure)[0]
        data = re.findall(r'<script type="application/json">(.*?)</script>', figure)
        found[title] = json.loads(data[0]) if data else {}
    return found


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is inside one file: numbers, charts, tables; nothing points elsewhere."""
    folder, output = pretraining(tmp_path / "a <b> & c"), tmp_path / "run.html"
    RunRecorder(folder, start=30).summarise(SUMMARY)
    assert main(["report", str(folder), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    text = output.read_text()
    reader = read(text)
    assert reader.open == []
    assert reader.pointers == ["data:,"]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "<b>" not in text.split("<body>")[1].split("</h1>")[0]

    drawn = charts(text)
    assert list(drawn) == [
        "Loss",
        "Rank of the second moment",
        "Error of the factors",
        "Step time",
        "Optimizer state",
        "Rank by layer",
        "Error by layer",
    ]
    loss = {line["name"]: (line["steps"], line["values"]) for line in drawn["Loss"]["lines"]}
    assert loss == {"training": ([10, 20, 30], [5, 4, 3]), "held out": ([20, 30], [3.5, 2.5])}
    state = {line["name"]: line["values"] for line in drawn["Optimizer state"]["lines"]}
    assert state["AdamW's would be"] == [400 / 2**20] * 3
    assert "25% of AdamW&#x27;s" in text
    assert "transformer.h.2, step 30: 5<" in text
    assert '<tr><td>transformer.h.10</td><td class="n">2.00</td>' in text
    assert "<td>&lt;ours&gt;.json</td>" in text
    assert "<td>versions torch</td><td>2.0</td>" in text


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Without errors, in light and dark, wide and narrow, with the values under the pointer."""
    folder, output = pretraining(tmp_path / "run"), tmp_path / "run.html"
    assert main(["report", str(folder), "-o", str(output)]) == 0
    grounds = set()
    with browser(tmp_path / "browser") as shown:
        for dark, width in ((False, 1300), (True, 400)):
            shown.open(output.as_uri(), dark=dark, width=width)
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            grounds.add(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert shown.evaluate("document.querySelectorAll('svg.chart').length") == 5
            box = shown.evaluate(
                "JSON.parse(JSON.stringify("
                "document.querySelector('svg.chart').getBoundingClientRect()))"
            )
            tip = "document.getElementById('tip')"
            assert shown.evaluate(f"getComputedStyle({tip}).visibility") == "hidden"
            shown.move_to(box["right"] - 20, box["top"] + 20)
            shown.wait_for(f"getComputedStyle({tip}).visibility === 'visible'")
            text = shown.evaluate(f"{tip}.textContent")
            assert text == "step 30\ntraining: 3\nheld out: 2.5"
            shown.move_to(1, 1)
            shown.wait_for(f"getComputedStyle({tip}).visibility === 'hidden'")
        assert shown.problems == []
        assert set(shown.requests) <= {output.as_uri(), "data:,"}
    assert len(grounds) == 2


def test_monitors_and_runs_that_go_on(tmp_path: Path) -> None:
    """No summary, no layers; a loss that became NaN is said and leaves a gap."""
    folder = monitored(
        tmp_path / "run",
        {
            "Train/Samples/lr": learning_rates(6),
            "Train/Samples/train_loss": [(4, 3.0), (8, math.nan), (12, 2.0), (16, 1.0)],
            "MicroAdam/state_bytes": [(8, 2**20)],
        },
    )
    output = tmp_path / "run.html"
    assert main(["report", str(folder), "-o", str(output)]) == 0
    text = output.read_text()
    assert read(text).open == []
    drawn = charts(text)
    assert list(drawn) == ["Loss", "Optimizer state"]
    assert drawn["Loss"]["lines"][0]["values"] == [3.0, None, 2.0, 1.0]
    figure = text.split("<figcaption>Loss")[1].split("</figure>")[0]
    assert (figure.count("<polyline"), figure.count("<circle")) == (1, 1)
    assert "least 1.0000" in text
    assert "The run</h2>" not in text and "Layers at" not in text


def test_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(pretraining(tmp_path / "run"))
    for arguments, message in (
        (["nowhere", "-o", str(tmp_path / "x.html")], "nowhere: no such folder"),
        ([run, "-o", str(tmp_path / "no" / "x.html")], "No such file or directory"),
        ([run], "the following arguments are required: -o"),
    ):
        with pytest.raises(SystemExit):
            main(["report", *arguments])
        assert message in capsys.readouterr().err


def test_no_finite_value() -> None:
    """Is said, not drawn; a logarithm needs positive ones."""
    for text in (
        line_chart("a", "", [Line("b", Curve([1, 2], [math.nan, math.inf]))]),
        line_chart("a", "", [Line("b", Curve([1], [0.0]))], log=True),
        heat_map("a", "", {"b": Curve([1], [-1.0])}, log=True),
    ):
        assert "no finite value was recorded" in text
        assert "<svg" not in text


def test_long_runs_stay_small() -> None:
    """Ten thousand steps and eighty layers; peaks and gaps are kept."""
    steps = [float(i) for i in range(10_000)]
    values = [1.0] * 10_000
    values[7777], values[1234] = 50.0, math.nan
    curve = Curve(steps, values)
    layers = {f"model.layers.{i}": curve for i in range(80)}
    text = page(Run("long", {"training": curve}, layers=layers), {})
    assert len(text) < 3e6
    (line,) = charts(text)["Loss"]["lines"]
    assert len(line["steps"]) < 2000
    assert 50.0 in line["values"] and None in line["values"]
    assert line["steps"][-1] == 9999
    assert "model.layers.79, step 9999: 1<" in text
