# SPDX-License-Identifier: Apache-2.0
"""The command line: what ``inspect`` prints and refuses, what ``convert`` takes and refuses."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapprox_ds.__main__ import main
from adapprox_ds.checkpoint import CheckpointError, convert, last_finished
from adapprox_ds.checkpoint.inspect import inspect
from adapprox_ds.core.layout import max_saving_rank
from tests.checkpoint.cases_universal import HALF, KNOBS, SHAPES
from tests.world import run_world

TAG = f"global_step{HALF}"
TRAINED = {name: shape for name, shape in SHAPES.items() if name != "frozen"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 3 on two ranks, native and converted."""
    scratch = tmp_path_factory.mktemp("inspect")
    cases = ["save_z1_2", "save_z3_2"]
    outcomes = run_world(2, "tests.checkpoint.cases_universal", cases, scratch)
    assert not any(outcomes.values()), outcomes
    return scratch


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", [TAG, f"{TAG}_universal"])
def test_the_table(saved: Path, stage: int, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every parameter with its shape, ranks within their limits, bytes and step."""
    folder = saved / f"save_z{stage}_2" / "run" / kind
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"of stage {stage} on 2 processes" in text
    assert f"step {HALF}; {len(TRAINED)} trained parameters, 1 frozen" in text
    report = inspect(folder)
    rows = {row.name.split(".")[1]: row for row in report.rows}
    assert set(rows) == set(TRAINED)
    for name, row in rows.items():
        assert row.shape == TRAINED[name]
        assert row.step == HALF
        assert row.first_bytes == 4 * math.prod(row.shape)
        assert re.search(rf"cells\.{name}\.weight +{'x'.join(map(str, row.shape))} ", text)
    emb, norm = rows["emb"], rows["norm"]
    assert 1 <= len(emb.ranks) <= 2
    assert all(1 <= k <= min(KNOBS["rank_max"], max_saving_rank(61, 40)) for k in emb.ranks)
    assert 0 < emb.error < 1
    assert emb.second_bytes < 4 * 61 * 40
    assert not norm.ranks and norm.second_bytes == 12


def test_native_and_universal_agree(saved: Path) -> None:
    """Ranks, bytes and errors are the same before and after the conversion."""
    for stage in (1, 3):
        run = saved / f"save_z{stage}_2" / "run"
        before, after = inspect(run / TAG).rows, inspect(run / f"{TAG}_universal").rows
        assert [repr(row) for row in before] == [repr(row) for row in after]


def test_a_runs_root_stands_for_its_latest(saved: Path) -> None:
    """``latest_universal`` before ``latest``."""
    assert "universal checkpoint" in inspect(saved / "save_z1_2" / "run").title


def drop_rank(folder: Path) -> None:
    next(folder.glob("*_pp_rank_1_*_optim_states.pt")).unlink()


def cut_file(folder: Path) -> None:
    path = next(folder.glob("*_pp_rank_0_*_optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-1000])


def foreign_file(folder: Path) -> None:
    torch.save({"weights": 1}, next(folder.glob("*_pp_rank_0_*_optim_states.pt")))


def drop_model(folder: Path) -> None:
    for path in folder.glob("*model_states.pt"):
        path.unlink()


def tensor_parallel(folder: Path) -> None:
    path = next(folder.glob("*_pp_rank_1_*_optim_states.pt"))
    path.rename(path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")))


def change_states(folder: Path, change: Callable[[dict[int, Any]], Any], rank: str = "*") -> None:
    """Change the optimizer states in the files of all ranks, or of one."""
    for path in folder.glob(f"*_pp_rank_{rank}_*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        optimizer = content["optimizer_state_dict"]
        base = optimizer.get("base_optimizer_state") or optimizer["optimizer_state_dict"]
        change(base["state"])
        torch.save(content, path)


def other_optimizer(folder: Path) -> None:
    change_states(folder, lambda states: [s.pop("exp_avg_sq") for s in states.values()])


def no_step(folder: Path) -> None:
    change_states(folder, dict.clear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_rank, r"was saved by 2 ranks and the files of \[1\] are missing"),
        (cut_file, r"optim_states\.pt cannot be read"),
        (foreign_file, "is no optimizer state of DeepSpeed's ZeRO"),
        (drop_model, "is no checkpoint of ZeRO"),
        (other_optimizer, "holds no exp_avg_sq"),
        (no_step, "saved before the first step"),
        (tensor_parallel, "tensor-, pipeline- or expert-parallel"),
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_incomplete_checkpoints(
    saved: Path,
    stage: int,
    change: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both commands end with code 1 and a message; nothing is left at the output's place."""
    folder = tmp_path / "broken"
    shutil.copytree(saved / f"save_z{stage}_2" / "run" / TAG, folder)
    change(folder)
    for command in (["inspect", str(folder)], ["convert", str(folder), str(tmp_path / "out")]):
        assert main(command) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "latest_universal").exists()


def test_foreign_folders(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one, one that is not there, and an interrupted conversion under either name."""
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is no checkpoint of ZeRO" in capsys.readouterr().err
    (tmp_path / "checkpoint-10").mkdir()
    assert main(["inspect", str(tmp_path)]) == 1
    assert "checkpoint-10 looks like one of the Trainer's" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "a.incomplete").mkdir()
    assert main(["inspect", str(tmp_path / "a.incomplete")]) == 1
    assert "interrupted conversion" in capsys.readouterr().err


def test_files_of_two_saves_are_not_mixed(saved: Path, tmp_path: Path) -> None:
    """Weights that are not the model file's; steps that differ between ranks."""
    source = saved / "save_z1_2" / "run" / TAG
    weights = tmp_path / "weights"
    shutil.copytree(source, weights)
    path = weights / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    content["module"]["cells.w1.weight"][3, 4] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"'cells\.w1\.weight' .* not those of its model"):
        convert(weights, tmp_path / "out", workers=1)
    convert(weights, tmp_path / "out2", workers=1, strict=False)
    steps = tmp_path / "steps"
    shutil.copytree(source, steps)
    change_states(steps, lambda states: [s["step"].add_(1) for s in states.values()], "1")
    with pytest.raises(CheckpointError, match=rf"different steps \[{HALF}, {HALF + 1}\]"):
        convert(steps, tmp_path / "out3", workers=1)


def experts(folder: Path, stage: int, step: int) -> None:
    """The files that DeepSpeed writes for one layer of two experts on two expert-parallel ranks."""
    folder.mkdir(parents=True)
    model = {"global_steps": step, "optimizer": None, "dp_world_size": 2, "mp_world_size": 1}
    torch.save(model | {"num_experts": [2]}, folder / "mp_rank_00_model_states.pt")
    for e in range(2):
        torch.save({"w": torch.ones(1)}, folder / f"layer_0_expert_{e}_mp_rank_00_model_states.pt")
        kind = "zero_pp_rank" if stage else "expp_rank"
        torch.save({"optimizer": {}}, folder / f"{kind}_{e}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("stage", [0, 1])
def test_experts(stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, without an expert, without an optimizer's file; beside a file as Python 3.10 globs."""
    for step in (1, 2, 3):
        experts(tmp_path / f"global_step{step}", stage, step)
    (tmp_path / "latest").write_text("global_step3")
    assert last_finished(tmp_path).name == "global_step3"
    (tmp_path / "global_step3" / "layer_0_expert_1_mp_rank_00_model_states.pt").unlink()
    assert last_finished(tmp_path).name == "global_step2"
    lost = "zero_pp_rank_1" if stage else "expp_rank_0"
    (tmp_path / "global_step2" / f"{lost}_mp_rank_00_optim_states.pt").unlink()
    assert last_finished(tmp_path).name == "global_step1"
    assert main(["inspect", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "expert-parallel" in said and "last finished one is" in said and "global_step1" in said


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_foreign_objects_are_not_unpickled(
    saved: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whichever file; only a flag lets them run, and then the rest is read as ever."""
    root, mark = tmp_path / "run", tmp_path / "ran"
    folder = root / TAG
    shutil.copytree(saved / "save_z3_2" / "run" / TAG, folder)
    (root / "latest").write_text(TAG)
    path = next(folder.glob(f"*_pp_rank_1_*_{kind}_states.pt"))
    torch.save(torch.load(path, weights_only=False) | {"mine": Trap(mark)}, path)
    out = str(tmp_path / "out")
    commands = (["inspect", str(folder)], ["inspect", str(root)], ["convert", str(folder), out])
    for command in commands:
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"{path} holds an object that is not safe to load" in said and "--trust" in said
    with pytest.raises(CheckpointError, match="not safe to load"):
        last_finished(root)
    assert not mark.exists() and not Path(out).exists()
    for command in commands:
        assert main([*command, "--trust"]) == 0
        assert mark.exists()
        mark.unlink()
    assert last_finished(root, trusted=True) == folder and mark.exists()


def test_the_stock_converters_options(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Are accepted; an existing output is not replaced unasked."""
    run, output = saved / "save_z3_2" / "run", tmp_path / "x_universal"
    stock = ["--input_folder", str(run), "--output_folder", str(output)]
    stock += ["--num_extract_workers", "2", "--num_merge_workers", "2", "--keep_temp_folder"]
    assert main(["convert", *stock, "--no_strict", "--inject_missing_state"]) == 0
    assert (tmp_path / "latest_universal").read_text() == "x_universal"
    first = inspect(output)
    assert main(["convert", str(run), str(output)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(run), str(output), "--overwrite", "--second-moment", "dense"]) == 0
    assert "; Adam, first moment of gradients\n" in inspect(output).table()
    assert not any(row.ranks for row in inspect(output).rows)
    assert any(row.ranks for row in first.rows)
    for wrong in (["convert", str(run)], ["convert", *stock, "--num_merge_workers", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    with pytest.raises(ValueError, match="second_moment='sparse'"):
        convert(run, tmp_path / "y", second_moment="sparse")
