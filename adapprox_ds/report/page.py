# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a run as one HTML file that needs no other files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from adapprox_ds._version import __version__
from adapprox_ds.report.runs import TRAINING, Curve, Run, duration, is_finished, read_run
from adapprox_ds.report.svg import Line, heat_map, line_chart

_MIB = 2**20

_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1c1c1a; --soft: #64635e;
  --rule: #e3e2dc; --c0: #2a78d6; --c1: #d9541e; --c2: #7a52c7; --c3: #1b8a5a; --c4: #c2268a;
  --c5: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --card: #201f1e; --ink: #efeeea;
  --soft: #a3a29b; --rule: #3a3936; --c0: #5aa2f0; --c1: #f5824f; --c2: #a98af0; --c3: #43bf87;
  --c4: #ee6cbb; --c5: #d0ac2c; } }
body { margin: 0 auto; padding: 24px; max-width: 1360px; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; }
.sub, .none, small { color: var(--soft); } .sub { margin: 0 0 18px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.cards div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.cards div { padding: 10px 14px; } .cards b { display: block; font-size: 21px; }
.cards span { color: var(--soft); font-size: 13px; }
.charts { display: grid; gap: 16px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); align-items: start; }
figure { margin: 0; padding: 12px 14px; min-width: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 5 4; } .grid { stroke: var(--rule); }
.cursor { stroke: var(--soft); visibility: hidden; }
.legend { margin: 4px 0; color: var(--soft); font-size: 13px; } .legend span { margin-right: 16px; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; }
.legend b { display: inline-block; width: 140px; height: 10px; vertical-align: middle; }
#tip { position: fixed; pointer-events: none; background: var(--card); color: var(--ink);
  border: 1px solid var(--rule); border-radius: 6px; padding: 4px 8px; font-size: 13px;
  visibility: hidden; white-space: pre; }
table { border-collapse: collapse; font-size: 14px; } .tables { overflow-x: auto; }
td, th { padding: 3px 18px 3px 0; text-align: left; border-bottom: 1px solid var(--rule); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
"""

# Moving the pointer over a chart shows the values at the nearest recorded step.
_SCRIPT = """
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(svg.parentNode.querySelector("script").textContent);
  const [first, last, left, right] = data.x, cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const wanted = first + (last - first) * (at - left) / (right - left);
    let step = null;
    for (const line of data.lines) for (const s of line.steps)
      if (step === null || Math.abs(s - wanted) < Math.abs(step - wanted)) step = s;
    const words = ["step " + step];
    for (const line of data.lines) {
      const i = line.steps.indexOf(step);
      if (i < 0) continue;
      const v = line.values[i];
      words.push(line.name + ": " + (v === null ? "not finite" : Number(v.toPrecision(5))));
    }
    const x = left + (last > first ? (step - first) / (last - first) : 0.5) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    cursor.style.visibility = tip.style.visibility = "visible";
    tip.textContent = words.join("\\n");
    const over = event.clientX + tip.offsetWidth + 24 > innerWidth;
    tip.style.left = event.clientX + (over ? -tip.offsetWidth - 12 : 12) + "px";
    tip.style.top = event.clientY + 12 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = tip.style.visibility = "hidden";
  });
}
"""


def write(folder: Path, output: Path) -> None:
    """Write the report of a run.

    Args:
        folder: the run's folder; see :func:`~adapprox_ds.report.runs.read_run`. The report also has
            the content of ``summary.json`` of a finished run of examples/pretrain.
        output: the HTML file to write.

    Raises:
        ValueError: the folder cannot be read.
        OSError: the file cannot be written.
    """
    run = read_run(folder)
    summary: dict[str, Any] = {}
    if is_finished(folder):
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    output.write_text(page(run, summary), "utf-8")


def page(run: Run, summary: dict[str, Any]) -> str:
    """The report of a run as HTML.

    Args:
        run: the run.
        summary: further facts by name. ``adamw_state_bytes`` is drawn beside the state's size.
    """
    adamw = summary.get("adamw_state_bytes")
    cards = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>"
        for name, value, note in _cards(run, adamw)
    )
    sections = [
        f'<div class="cards">{cards}</div>',
        f'<div class="charts">{"".join(_charts(run, adamw))}</div>',
        f'<div class="charts">{"".join(_maps(run))}</div>',
        _layers(run),
        _summary(summary),
    ]
    name = escape(run.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style></head>\n<body><h1>{name}</h1>'
        f'<p class="sub">up to step {run.last_step}; written by adapprox_ds {__version__}</p>\n'
        + "\n".join(sections)
        + f'\n<div id="tip"></div><script>{_SCRIPT}</script></body></html>\n'
    )


def _cards(run: Run, adamw: float | None) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the value and a note for each of the run's last numbers."""
    for name, curve in run.losses.items():
        least = min(filter(math.isfinite, curve.values), default=math.nan)
        note = f"{run.unit}; " if run.unit else ""
        yield f"loss, {name}", f"{curve.values[-1]:.4f}", f"{note}least {least:.4f}"
    if run.mean_rank:
        yield "rank", f"{run.mean_rank.values[-1]:.2f}", "mean over matrices"
    if run.mean_error:
        largest = f"; largest {run.largest_error.values[-1]:.2g}" if run.largest_error else ""
        yield "error", f"{run.mean_error.values[-1]:.2g}", f"mean over matrices{largest}"
    if run.step_seconds:
        took = f"; {duration(run.seconds.values[-1])} in all" if run.seconds else ""
        yield "time of a step", f"{median(run.step_seconds.values):.3g} s", f"median{took}"
    if run.state_bytes:
        size = run.state_bytes.values[-1]
        part = f"; {size / adamw:.0%} of AdamW's" if adamw else ""
        yield "optimizer state", f"{size / _MIB:,.2f} MiB", f"all processes together{part}"


def _charts(run: Run, adamw: float | None) -> Iterator[str]:
    """Yield a chart for everything that was recorded for the whole model."""
    if run.losses:
        lines = [Line(name, curve, name != TRAINING) for name, curve in run.losses.items()]
        yield line_chart("Loss", run.unit, lines[:6])
    if run.mean_rank:
        yield line_chart("Rank of the second moment", "", [Line("mean of k", run.mean_rank)])
    errors = [
        Line(name, curve)
        for name, curve in (("mean", run.mean_error), ("largest", run.largest_error))
        if curve
    ]
    if errors:
        yield line_chart("Error of the factors", "relative Frobenius error ξ", errors, log=True)
    if run.step_seconds:
        lines = [Line("wall time a step", run.step_seconds)]
        yield line_chart("Step time", "seconds, mean since the point before", lines)
    if run.state_bytes:
        steps, sizes = run.state_bytes
        lines = [Line("first and second moments", Curve(steps, [n / _MIB for n in sizes]))]
        if adamw:
            lines.append(Line("AdamW's would be", Curve(steps, [adamw / _MIB] * len(steps))))
        yield line_chart("Optimizer state", "MiB, all processes together", lines, from_zero=True)


def _maps(run: Run) -> Iterator[str]:
    """Yield a map for everything that was recorded for each layer."""
    if run.layers:
        yield heat_map("Rank by layer", "mean of k over a layer's matrices", run.layers)
    if run.errors:
        yield heat_map("Error by layer", "relative Frobenius error ξ", run.errors, log=True)


def _layers(run: Run) -> str:
    """A table with the last rank and error of each layer."""
    if not run.layers:
        return ""
    head = '<th>layer</th><th class="n">rank</th>' + '<th class="n">error</th>' * bool(run.errors)
    rows = []
    for name, curve in run.layers.items():
        cells = f'<td>{escape(name)}</td><td class="n">{curve.values[-1]:.2f}</td>'
        if run.errors:
            known = run.errors.get(name)
            cells += f'<td class="n">{f"{known.values[-1]:.2e}" if known else ""}</td>'
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<h2>Layers at the last step</h2><div class="tables"><table><tr>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _summary(summary: dict[str, Any]) -> str:
    """A table with the facts of the run's summary."""
    if not summary:
        return ""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {" ".join(filter(None, [key, part])).replace("_", " "): v for part, v in parts}
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(_cell(value))}</td></tr>"
        for key, value in flat.items()
        if value is not None
    )
    return f'<h2>The run</h2><div class="tables"><table>{rows}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
