# SPDX-License-Identifier: Apache-2.0
"""``python -m adapprox_ds watch``: a run in a pseudo-terminal, and its numbers without one."""

from __future__ import annotations

import codecs
import fcntl
import math
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
from pathlib import Path

import pytest

pytest.importorskip("rich")
from adapprox_ds.__main__ import main
from adapprox_ds.report.characters import chart, sparkline
from adapprox_ds.report.runs import Curve, is_finished, read_run
from recording import RunRecorder
from tests.report.run_folders import learning_rates, monitored, pretraining, record

#: Colours, cursor movements and the like; "home" begins a new picture of the whole screen.
CONTROLS, HOME = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]"), "\x1b[H"


def _watch(folder: Path) -> None:
    """The command, in a process that has imported torch already; does not return."""
    os.environ["TERM"] = "xterm-256color"
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    code = 1
    try:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(["watch", str(folder)])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, folder: Path, columns: int, lines: int) -> None:
        # The terminal is the one that controls the child: Ctrl-C reaches it as a signal.
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
            _watch(folder)
        self.written = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.written = ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self, seconds: float) -> bool:
        """Take what comes; whether the command still runs."""
        if select.select([self.descriptor], [], [], seconds)[0]:
            try:
                data = os.read(self.descriptor, 1 << 16)
            except OSError:  # its end is closed
                return False
            self.written += self.decoder.decode(data)
            return bool(data)
        return True

    def screen(self) -> str:
        """The newest whole picture."""
        frames = self.written.split(HOME)
        return CONTROLS.sub("", frames[-2] if len(frames) > 2 else frames[-1])

    def wait_for(self, *texts: str) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            alive = self.read(0.2)
            seen = self.screen()
            if all(text in seen for text in texts):
                return seen
            assert alive, self.written
        raise AssertionError(f"{texts} did not come:\n{self.screen()}")

    def end(self) -> tuple[int, str]:
        """The exit code, and what stays in the terminal."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.read(0.2):
            pass
        _, status = os.waitpid(self.process, 0)
        os.close(self.descriptor)
        # The alternate screen is left by this.
        return os.waitstatus_to_exitcode(status), CONTROLS.sub(
            "", self.written.rpartition("\x1b[?1049l")[2]
        )


def test_a_run_from_before_its_start_to_its_end(tmp_path: Path) -> None:
    """Waits, shows what comes, follows the window's size, and ends with the run."""
    folder = tmp_path / "run"
    terminal = Terminal(folder, 120, 36)
    assert "no such folder" in terminal.wait_for("waiting for the first numbers", "Ctrl-C ends")
    recorder = RunRecorder(pretraining(folder), start=30)
    seen = terminal.wait_for("step 30", "60 min 0 s in steps")
    for text in (
        "loss (nats/token)",
        "training 3.0000",
        "held out 2.5000",
        "rank by layer",
        "step time",
        "180 s",
        "mean rank",
        "6.00",
        "mean error",
        "1.00e-02",
        "state",
        "0.00 MiB",
    ):
        assert text in seen, seen
    for layer, rank, error in (("h.2", "5.00", "7.00e-02"), ("h.10", "2.00", "4.00e-02")):
        assert re.search(rf"transformer\.{layer} +{rank} +█+ +{error}", seen), seen
    assert re.search("[⠁-⣿]{3}", seen)
    with recorder.metrics_path.open("a") as file:
        file.write("40,9.")  # half a row is no number yet
    terminal.resize(62, 18)
    seen = terminal.wait_for("step 30", "training 3.0000", "rank by layer, 1 of 3")
    assert max(map(len, seen.splitlines())) <= 62
    text = recorder.metrics_path.read_text()
    recorder.metrics_path.write_text(text.removesuffix("40,9."))
    record(recorder, 40)
    terminal.wait_for("step 40", "training 2.0000")
    recorder.summarise({"steps": 40})
    code, left = terminal.end()
    assert code == 0, left
    assert re.search(r"loss, training +2\.0000 nats/token at step 40\r\n", left), left
    assert "rank of transformer.h.2" in left


def test_control_c_ends_it(tmp_path: Path) -> None:
    """Of a run of csv_monitor, which does not say when it is over; MicroAdam has no ranks."""
    folder = monitored(
        tmp_path / "run",
        {
            "Train/Samples/lr": learning_rates(6),
            "Train/Samples/train_loss": [(8, 3.0), (24, math.nan)],
            "MicroAdam/state_bytes": [(8, 2**20), (24, 3 * 2**20)],
            "MicroAdam/step_seconds": [(8, 0.5), (24, 0.25)],
        },
    )
    terminal = Terminal(folder, 100, 30)
    seen = terminal.wait_for("step 6", "state")
    assert "training nan" in seen and "3.00 MiB" in seen and "0.25 s" in seen
    assert "rank" not in seen
    terminal.type("\x03")
    code, left = terminal.end()
    assert code == 0, left
    assert re.search("optimizer state +3.00 MiB, all processes together", left), left
    assert "Traceback" not in left


def test_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest numbers once; what cannot be read is an error."""
    assert main(["watch", str(pretraining(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run                       step 30, 60 min 0 s in steps",
        "loss, training            3.0000 nats/token at step 30",
        "loss, held out            2.5000 nats/token at step 30",
        "rank                      6.00, mean over matrices",
        "error                     0.01, mean over matrices",
        "step time                 180 s, median 120 s",
        "optimizer state           0.00 MiB, all processes together",
        "rank of transformer.wte   8.00",
        "rank of transformer.h.2   5.00",
        "rank of transformer.h.10  2.00",
    ]
    with pytest.raises(SystemExit) as left:
        main(["watch", str(tmp_path / "nowhere")])
    assert left.value.code == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_without_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path)])
    assert 'pip install "adapprox-ds[watch]"' in capsys.readouterr().err


def test_a_summary_of_an_earlier_run_ends_nothing(tmp_path: Path) -> None:
    """A run that is started again in the same folder writes its rows after it."""
    folder = pretraining(tmp_path / "run")
    assert not is_finished(folder)
    RunRecorder(folder, start=30).summarise({})
    assert is_finished(folder)
    written = (folder / "summary.json").stat().st_mtime
    os.utime(folder / "metrics.csv", (written + 1, written + 1))
    assert not is_finished(folder)
    (folder / "metrics.csv").unlink()
    assert not is_finished(folder)


def test_half_a_row_is_left_out(tmp_path: Path) -> None:
    """A reader that took it would show a loss of 9 for one of 9.25."""
    run = pretraining(tmp_path / "run")
    logs = monitored(
        tmp_path / "logs",
        {"Train/Samples/lr": learning_rates(3), "Train/Samples/train_loss": [(4, 3.0)]},
    )
    for path, text in (
        (run / "metrics.csv", "40,9.,"),
        (run / "ranks.csv", "40,transformer.h.2"),
        (logs / "Train_Samples_train_loss.csv", "8,9."),
    ):
        with path.open("a") as file:
            file.write(text)
    assert read_run(run).losses["training"] == Curve([10, 20, 30], [5, 4, 3])
    assert read_run(run).last_step == 30
    assert read_run(logs).losses["training"] == Curve([1], [3])


def test_charts_in_characters() -> None:
    """Dots lie where values do; what is not finite interrupts a curve."""
    drawn = chart([Curve([0, 3], [0.0, 1.0]), Curve([0, 3], [1.0, 1.0])], 2, 1)
    assert drawn is not None
    assert (drawn.low, drawn.high, drawn.first, drawn.last) == (0.0, 1.0, 0, 3)
    # A rising diagonal of four dots, then the upper edge: braille bits by column from the left.
    left, right = (0x40 | 0x20) | (0x01 | 0x08), (0x02 | 0x08) | (0x01 | 0x08)
    assert [cell.text for cell in drawn.rows[0]] == [chr(0x2800 + left), chr(0x2800 + right)]
    assert [cell.curve for cell in drawn.rows[0]] == [1, 1]
    gap = chart([Curve([0, 1, 2, 3], [1.0, math.nan, math.inf, 1.0])], 2, 1)
    assert gap is not None
    assert [cell.text for cell in gap.rows[0]] == ["⠄", "⠠"]
    assert chart([Curve([0], [math.nan])], 2, 1) is None
    assert sparkline([0.0, 1.0, math.nan, 7.0], 3) == "▁·█"
    assert sparkline([math.inf], 3) == "·"
