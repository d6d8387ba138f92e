# SPDX-License-Identifier: Apache-2.0
"""Shows a run in the terminal while it trains: losses, ranks by layer, errors, step time, state.

It only reads the files that the run writes anyway, so that the run is not disturbed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from adapprox_ds.report.characters import AXIS_WIDTH, chart, sparkline
from adapprox_ds.report.runs import Run, duration, is_finished, read_run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.layout import Layout
    from rich.panel import Panel

#: The shortest pause between two readings of the files, in seconds and as a multiple of the time
#: that the last reading took.
_PAUSE, _SHARE = 0.5, 10
#: The widths of a sparkline and of a rank's bar, and the smallest width of a screen with panels
#: side by side, in characters.
_SPARK, _BAR, _WIDE = 24, 12, 90
_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
_MIB = 2**20


def watch(folder: Path) -> None:
    """Show a run in the terminal until it is finished or Ctrl-C is pressed.

    If the folder does not exist yet, or has no numbers yet, this waits for it. If the standard
    output is no terminal, the last numbers are printed once.

    Args:
        folder: the run's folder; see :func:`~adapprox_ds.report.runs.read_run`.

    Raises:
        ValueError: the terminal cannot show Unicode, or there is no terminal and the folder cannot
            be read.
        ModuleNotFoundError: the package rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('watch needs rich: pip install "adapprox-ds[watch]"') from error

    console = Console(highlight=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        print(describe(read_run(folder)))
        return
    if not console.encoding.lower().startswith("utf"):
        raise ValueError(
            f"watch: the terminal's encoding {console.encoding!r} is not allowed; allowed: UTF-8 "
            "(set PYTHONUTF8=1 or a UTF-8 locale)"
        )
    reader = _Reader(folder)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                begin = time.monotonic()
                reader.look()
                live.update(_screen(reader, console.width, console.height), refresh=True)
                if reader.finished:
                    break
                time.sleep(max(_PAUSE, _SHARE * (time.monotonic() - begin)))
    except KeyboardInterrupt:
        pass
    # The live screen is cleared at its end; these lines stay in the terminal.
    print(describe(reader.run) if reader.run else reader.problem)


def describe(run: Run) -> str:
    """The last numbers of a run, as lines of text."""
    took = f", {duration(run.seconds.values[-1])} in steps" if run.seconds else ""
    rows = [(f"{run.name}", f"step {run.last_step}{took}")]
    for name, curve in run.losses.items():
        unit = f" {run.unit}" if run.unit else ""
        rows.append(
            (f"loss, {name}", f"{curve.values[-1]:.4f}{unit} at step {curve.steps[-1]:.10g}")
        )
    if run.mean_rank:
        rows.append(("rank", f"{run.mean_rank.values[-1]:.2f}, mean over matrices"))
    if run.mean_error:
        largest = f", largest {run.largest_error.values[-1]:.3g}" if run.largest_error else ""
        rows.append(("error", f"{run.mean_error.values[-1]:.3g}, mean over matrices{largest}"))
    if run.step_seconds:
        seconds = run.step_seconds.values
        rows.append(("step time", f"{seconds[-1]:.3g} s, median {median(seconds):.3g} s"))
    if run.state_bytes:
        size = run.state_bytes.values[-1] / _MIB
        rows.append(("optimizer state", f"{size:,.2f} MiB, all processes together"))
    rows += [(f"rank of {name}", f"{curve.values[-1]:.2f}") for name, curve in run.layers.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


@dataclass(slots=True)
class _Reader:
    """Reads a run again whenever its files have changed.

    Attributes:
        folder: the run's folder.
        run: the run as it was read last; None before it could be read.
        problem: why the folder could not be read; empty where it could.
        finished: whether the run is finished.
        changed: the time of the last change of a file, in seconds since the epoch.
        stamp: name, time of the last change and size of each file when they were read last.
    """

    folder: Path
    run: Run | None = None
    problem: str = ""
    finished: bool = False
    changed: float = 0.0
    stamp: tuple[tuple[str, int, int], ...] | None = None

    def look(self) -> None:
        """Read the files if they have changed; if that fails, say so in ``problem``."""
        try:
            stamp = self._stamp()
            if stamp == self.stamp:
                return
            self.run, self.problem = read_run(self.folder), ""
            self.finished = is_finished(self.folder)
            self.stamp = stamp
            self.changed = max(path.stat().st_mtime for path in self.folder.glob("*.csv"))
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def _stamp(self) -> tuple[tuple[str, int, int], ...]:
        files = sorted([*self.folder.glob("*.csv"), *self.folder.glob("summary.json")])
        stats = [(path.name, path.stat()) for path in files]
        return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _screen(reader: _Reader, width: int, height: int) -> RenderableType:
    """The whole screen, or, before the run could be read, a panel that says why."""
    from rich.align import Align
    from rich.layout import Layout
    from rich.panel import Panel
    from rich.text import Text

    run = reader.run
    if run is None:
        words = Text.assemble(
            "waiting for the first numbers\n", (reader.problem, "dim"), "\n\nCtrl-C ends"
        )
        return Panel(Align.center(words, vertical="middle"), title=str(reader.folder))
    age = max(time.time() - reader.changed, 0.0)
    took = f"   {duration(run.seconds.values[-1])} in steps" if run.seconds else ""
    head = Text.assemble(
        (f"step {run.last_step}", "bold"),
        took,
        f"   written {duration(age)} ago",
        (f"   {reader.problem}", "red") if reader.problem else "   Ctrl-C ends",
    )
    screen = Layout()
    body = Layout(name="body")
    screen.split_column(
        Layout(Panel(head, title=run.name), size=3),
        body,
        Layout(_numbers(run), size=4 if width >= _WIDE else 5),
    )
    losses = Layout(Panel(_Losses(run), title=f"loss ({run.unit})" if run.unit else "loss"))
    if not run.layers:
        body.update(losses)
    elif width >= _WIDE:
        body.split_row(losses, Layout(_ranks(run, height - 12)))
    else:
        half = (height - 8) // 2
        body.split_column(losses, Layout(_ranks(run, half - 4), size=half))
    return screen


class _Losses:
    """A chart of the losses with the size of its panel, and their last values above it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the chart; rich calls this with the size of the panel."""
        from rich.text import Text

        curves = self.run.losses
        if not curves:
            yield Text("no loss is recorded", style="dim")
            return
        colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(curves))]
        legend = Text(" " * AXIS_WIDTH)
        for (name, curve), colour in zip(curves.items(), colours, strict=True):
            legend.append(f"{name} {curve.values[-1]:.4f}   ", style=colour)
        yield legend
        width = max(options.max_width - AXIS_WIDTH, 1)
        height = max((options.height or 12) - 2, 1)
        drawn = chart(list(curves.values()), width, height)
        if drawn is None:
            yield Text("no loss is finite", style="red")
            return
        for i, row in enumerate(drawn.rows):
            label = {0: f"{drawn.high:.3f}", height - 1: f"{drawn.low:.3f}"}.get(i, "")
            line = Text(label.rjust(AXIS_WIDTH - 1) + " ", style="dim")
            for cell in row:
                line.append(cell.text, style=colours[cell.curve] if cell.curve >= 0 else "")
            yield line
        first, last = f"{drawn.first:.10g}", f"step {drawn.last:.10g}"
        yield Text(" " * AXIS_WIDTH + first + last.rjust(max(width - len(first), 0)), style="dim")


def _ranks(run: Run, rows: int) -> Panel:
    """A table with the rank of each layer, or of evenly chosen layers if there are too many."""
    from rich.panel import Panel
    from rich.table import Table

    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("rank", justify="right")
    table.add_column("", width=_BAR)
    if run.errors:
        table.add_column("error", justify="right")
    names = list(run.layers)
    shown = _spread(names, max(rows, 1))
    largest = max(curve.values[-1] for curve in run.layers.values()) or 1.0
    for name in shown:
        rank = run.layers[name].values[-1]
        cells = [name, f"{rank:.2f}", "█" * round(_BAR * rank / largest)]
        if run.errors:
            known = run.errors.get(name)
            cells.append(f"{known.values[-1]:.2e}" if known else "")
        table.add_row(*cells)
    count = f", {len(shown)} of {len(names)}" if len(shown) < len(names) else ""
    return Panel(table, title=f"rank by layer{count}")


def _spread(names: Sequence[str], count: int) -> list[str]:
    """At most ``count`` names, evenly chosen, with the first and the last."""
    if len(names) <= count:
        return list(names)
    if count == 1:
        return [names[-1]]
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _numbers(run: Run) -> Layout:
    """Panels side by side with step time, rank, error and state, if they were recorded."""
    from rich.layout import Layout
    from rich.panel import Panel
    from rich.text import Text

    panels = []
    for title, curve, words in (
        ("step time", run.step_seconds, "{:.3g} s"),
        ("mean rank", run.mean_rank, "{:.2f}"),
        ("mean error", run.mean_error, "{:.2e}"),
        ("state", run.state_bytes, "{:,.2f} MiB"),
    ):
        if curve is None:
            continue
        values = [v / _MIB for v in curve.values] if curve is run.state_bytes else curve.values
        lines = [Text(words.format(values[-1]), style="bold"), Text(sparkline(values, _SPARK))]
        if curve is run.mean_error and run.largest_error:
            lines[0].append(f"   largest {run.largest_error.values[-1]:.2e}", style="")
        if curve is run.step_seconds:
            lines[0].append(f"   median {median(values):.3g} s", style="")
        panels.append(Layout(Panel(Text("\n").join(lines), title=title)))
    row = Layout()
    if panels:
        row.split_row(*panels)
    else:
        row.update(Text(""))
    return row
