# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs: what is on their axes, from both kinds of folder, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapprox_ds.__main__ import main
from adapprox_ds.report.plot import draw
from adapprox_ds.report.runs import read_run
from plotting import plot_run
from recording import RunRecorder
from tests.report.run_folders import learning_rates, monitored, pretraining


def picture(*folders: Path) -> Figure:
    return draw([read_run(folder) for folder in folders])


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn, by label."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def words(axes: Axes) -> tuple[str, str, str]:
    return axes.get_title(), axes.get_xlabel(), axes.get_ylabel()


def test_pretraining_runs(tmp_path: Path) -> None:
    """Losses over steps and time, each run in its colour; ranks by layer, of all shards."""
    loss, time, rank = picture(
        pretraining(tmp_path / "ours"), pretraining(tmp_path / "adamw", factored=False)
    ).axes
    assert words(loss) == ("Loss over steps", "optimizer step", "loss (nats/token)")
    assert words(time) == ("Loss over time", "time (min)", "loss (nats/token)")
    names = ["ours, training", "ours, held out", "adamw, training", "adamw, held out"]
    for axes, xs in ((loss, [10, 20, 30]), (time, [10, 30, 60])):
        assert list(lines(axes)) == legend(axes) == names
        assert lines(axes)["ours, training"] == (xs, [5, 4, 3])
        assert lines(axes)["adamw, held out"] == (xs[1:], [3.5, 2.5])
        assert len({line.get_color() for line in axes.get_lines()}) == 2
        assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "--"] * 2
    assert words(rank)[:2] == ("Rank of the second moment: ours", "optimizer step")
    # By depth, not by name; numbers count as layers, and the mean is of all matrices.
    layers = ["all matrices", "transformer.h.2", "transformer.h.10", "transformer.wte"]
    assert list(lines(rank)) == legend(rank) == layers
    assert lines(rank)["transformer.h.2"] == ([10, 20, 30], [7, 6, 5])
    assert lines(rank)["transformer.h.10"] == ([10, 20, 30], [4, 3, 2])
    assert lines(rank)["all matrices"] == ([10, 20, 30], [8, 7, 6])
    assert rank.get_ylim() == (0, pytest.approx(10.5))


def test_the_picture_of_one_pretraining_run(tmp_path: Path) -> None:
    """Loss and unigram entropy, ranks and errors by layer; without factors the loss alone."""
    drawn = []
    with mock.patch.object(Figure, "savefig", lambda figure, path, **_: drawn.append(figure)):
        plot_run(pretraining(tmp_path / "ours"), 6.5)
        plot_run(pretraining(tmp_path / "adamw", factored=False), 6.5)
    loss, rank, error = drawn[0].axes
    assert lines(loss) == {
        "training": ([10, 20, 30], [5, 4, 3]),
        "held out": ([20, 30], [3.5, 2.5]),
        "unigram entropy 6.50": ([0, 1], [6.5, 6.5]),
    }
    assert lines(rank)["transformer.h.2"] == ([10, 20, 30], [7, 6, 5])
    assert lines(error)["transformer.h.2"] == ([10, 20, 30], [0.07, 0.07, 0.07])
    assert list(lines(error)) == list(lines(rank))
    assert [axes.get_title() for axes in drawn[1].axes] == ["Loss"]
    plot_run(tmp_path / "adamw", 6.5)
    assert (tmp_path / "adamw/training.png").read_bytes().startswith(b"\x89PNG")


def test_monitors_of_deepspeed(tmp_path: Path) -> None:
    """Samples become steps; a loss is what is called one; no time is made up."""
    ours = monitored(
        tmp_path / "ours",
        {
            "Train/Samples/lr": learning_rates(6),
            "Train/Samples/train_loss": [(8, 3.0), (24, 2.0)],
            "Train/Samples/loss_scale": [(4, 256.0)],
            "Eval/Samples/held_out_loss": [(0, 4.0), (16, 2.5)],
            "Adapprox/mean_rank": [(8, 4.0), (16, 3.0)],
            "Adapprox/rank/model.layers.0": [(8, 5.0), (16, 2.0)],
            "Adapprox/step_seconds": [(8, 0.5), (16, 1.5)],
        },
    )
    adamw = monitored(
        tmp_path / "adamw",
        {"Train/Samples/lr": learning_rates(2), "Train/Samples/train_loss": [(4, 3.0), (8, 2.0)]},
    )
    (ours / "notes.csv").write_text("not,of,the,monitor\n")
    loss, time, rank = picture(ours, adamw).axes
    assert words(loss) == ("Loss over steps", "optimizer step", "loss")
    assert lines(loss) == {
        "ours, training": ([2, 6], [3, 2]),
        "ours, held out": ([0, 4], [4, 2.5]),
        "adamw, training": ([1, 2], [3, 2]),
    }
    assert words(time) == ("Loss over time (not recorded: adamw)", "time (s)", "loss")
    assert lines(time)["ours, held out"] == ([0, 4], [4, 2.5])
    xs, _ = lines(time)["ours, training"]
    assert xs[0] == 1
    assert xs[1] != xs[1], "a time after the last that was written"
    assert lines(rank) == {"model.layers.0": ([2, 4], [5, 2]), "all matrices": ([2, 4], [4, 3])}


def test_the_times_of_microadam(tmp_path: Path) -> None:
    """They are drawn as Adapprox's are; there is no rank to draw."""
    events: dict[str, list[tuple[float, float] | str]] = {
        "Train/Samples/lr": [*learning_rates(4)],
        "Train/Samples/train_loss": [(8, 3.0), (16, 2.0)],
        "MicroAdam/step_seconds": [(8, 0.5), (16, 1.5)],
    }
    _, time = picture(monitored(tmp_path / "micro", events)).axes
    assert lines(time) == {"micro, training": ([1, 4], [3, 2])}


def test_a_log_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Written on in the same files: what came after the checkpoint is what was done again."""
    events: dict[str, list[tuple[float, float] | str]] = {
        "Train/Samples/lr": [*learning_rates(9), "lr", *learning_rates(7, first=5)],
        "Train/Samples/train_loss": [(8, 3.0), (24, 9.0), (32, 9.0), "train_loss", (24, 2.0)],
        "Adapprox/mean_rank": [(16, 4.0), (36, 9.0)],
    }
    loss, rank = picture(monitored(tmp_path / "run", events)).axes
    assert lines(loss) == {"run, training": ([2, 6], [3, 2])}
    assert lines(rank) == {"all matrices": ([4], [4])}
    # In new files: counted from where the first step stands.
    events = {
        "Train/Samples/lr": [*learning_rates(7, first=5)],
        "Train/Samples/train_loss": [(24, 2.0)],
    }
    (loss,) = picture(monitored(tmp_path / "later", events)).axes
    assert lines(loss) == {"later, training": ([6], [2])}


def test_steps_of_changing_size(tmp_path: Path) -> None:
    """Each row of the learning rate is a step, however many samples it took."""
    events: dict[str, list[tuple[float, float] | str]] = {
        "Train/Samples/lr": [(2, 1e-3), (8, 1e-3), (12, 1e-3)],
        "Train/Samples/train_loss": [(2, 3.0), (8, 2.0), (12, 1.0)],
    }
    (loss,) = picture(monitored(tmp_path / "run", events)).axes
    assert lines(loss)["run, training"] == ([1, 2, 3], [3, 2, 1])


def test_many_layers_and_equal_names(tmp_path: Path) -> None:
    """Every layer has a line of its own shade, the legend names a few; runs are told apart."""
    events: dict[str, list[tuple[float, float] | str]] = {
        "Train/Samples/lr": learning_rates(3),
        **{f"Adapprox/rank/h.{i}": [(4, 8.0), (12, i + 1.0)] for i in range(30)},
    }
    folders = [monitored(tmp_path / part / "run", events) for part in ("a", "b")]
    first, second = picture(*folders).axes
    assert [axes.get_title()[-7:] for axes in (first, second)] == ["run (1)", "run (2)"]
    assert [line.get_ydata()[-1] for line in first.get_lines()] == list(range(1, 31))
    assert len({tuple(line.get_color()) for line in first.get_lines()}) == 30
    assert legend(first)[0] == "h.0"
    assert legend(first)[-1] == "h.29"
    assert len(legend(first)) <= 10


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_command_line_writes_a_picture(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a size that two panels need."""
    run, output = pretraining(tmp_path / "run", factored=False), tmp_path / name
    assert main(["plot", str(run), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    start = output.read_bytes()[:200]
    if name.endswith("svg"):
        assert b"<svg" in output.read_bytes()[:1000]
    else:
        assert start.startswith(b"\x89PNG")
        assert int.from_bytes(start[16:20]) == 2 * 640


def empty(folder: Path) -> None:
    folder.mkdir()


def missing(folder: Path) -> None:
    pass


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "table.csv").write_text("a,b\n1,2\n")


def no_steps(folder: Path) -> None:
    monitored(folder, {"Train/Samples/train_loss": [(4, 3.0)]})


def no_loss(folder: Path) -> None:
    monitored(folder, {"Train/Samples/lr": learning_rates(3)})


def no_rows(folder: Path) -> None:
    RunRecorder(folder, start=0)


def no_column(folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss\n1,2\n")


def bad_value(folder: Path) -> None:
    monitored(folder, {"Train/Samples/lr": learning_rates(3)})
    (folder / "a_train_loss.csv").write_text("step,train_loss\n4,tensor(2.5)\n")


def short_row(folder: Path) -> None:
    with pretraining(folder).joinpath("ranks.csv").open("a") as file:
        file.write("40,h.2.mlp\n")


REFUSED: dict[Callable[[Path], object], str] = {
    missing: "run: no such folder",
    empty: "run: neither a folder of examples/pretrain .* nor one of DeepSpeed's csv_monitor",
    foreign: "run: neither a folder of examples/pretrain .* nor one of DeepSpeed's csv_monitor",
    no_steps: "run: Train_Samples_lr.csv, which DeepSpeed writes at every step, is not there",
    no_loss: "run: neither a loss nor a rank was recorded there",
    no_rows: "run: neither a loss nor a rank was recorded there",
    no_column: "metrics.csv: no column train_loss, held_out_loss, mean_rank, mean_error, "
    "state_bytes, step_seconds",
    short_row: "ranks.csv: '40,h.2.mlp' has 2 of 5 columns",
    bad_value: r"a_train_loss.csv: 'tensor\(2.5\)' is not a number",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_folders_that_cannot_be_drawn(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Each is named with what is wrong in it."""
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=REFUSED[make]):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("run", "output", "message"),
    [
        ("nowhere", "x.png", "nowhere: no such folder"),
        ("run", "x.doc", "'doc' is not supported"),
        ("run", "nowhere/x.png", "No such file or directory"),
    ],
)
def test_command_line_refuses(
    tmp_path: Path, run: str, output: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and the reason."""
    pretraining(tmp_path / "run", factored=False)
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(tmp_path / run), "-o", str(tmp_path / output)])
    assert message in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra that brings it is named."""
    run = pretraining(tmp_path / "run")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="2"):
        main(["plot", str(run), "-o", str(tmp_path / "x.png")])
    assert 'pip install "adapprox-ds[examples]"' in capsys.readouterr().err
