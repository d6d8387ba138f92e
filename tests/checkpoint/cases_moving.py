# SPDX-License-Identifier: Apache-2.0
"""Stock tools on our checkpoints, faults and kills. Run by test_universal.py."""

from __future__ import annotations

import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.checkpoint import CheckpointError, convert, files, load_universal
from adapprox_ds.checkpoint.inspect import inspect
from adapprox_ds.checkpoint.place import read_placement
from tests.checkpoint.cases_universal import (
    HALF,
    KINDS,
    KNOBS,
    NO_DECAY,
    Traveller,
    compare_second_moment,
    follow,
    gather,
    relative,
    start,
    train,
)
from tests.zero.cases_stages import adapprox_of, config_of

TAG = f"global_step{HALF}"


def record_of(source: str, folder: Path) -> tuple[dict[str, Any], Path]:
    saved = folder.parent / f"save_{source}"
    return torch.load(saved / "record.pt"), saved / "run"


def stock_engine(
    kind: str,
    *,
    named: bool = True,
    momenta: Sequence[str] = ("gradient", "gradient"),
    **more: Any,
) -> tuple[Any, Traveller]:
    """``deepspeed.initialize`` with an instance, no help of ours; empty weights."""
    model = Traveller()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        members = [(f"cells.{n}.weight", c.weight) for n, c in model.cells.items()]
        members = [m for m in members if (m[0].split(".")[1] not in NO_DECAY) == decays]
        groups.append({"params": members if named else [p for _, p in members]})
    groups[1]["weight_decay"] = 0.0
    for group, momentum in zip(groups, momenta, strict=True):
        group["momentum"] = momentum
    config = {k: v for k, v in config_of(KINDS[kind]).items() if k != "optimizer"} | more
    optimizer = Adapprox(groups, lr=1e-2, weight_decay=0.1, **KNOBS)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], model


def stock_load(source: str, kind: str, folder: Path) -> None:
    """``engine.load_checkpoint`` reads what our converter wrote; cross-stage too."""
    record, run = record_of(source, folder)
    engine, _ = stock_engine(kind, checkpoint={"load_universal": True})
    path, client = engine.load_checkpoint(str(run))
    assert path is not None
    assert client["mine"] == [1, 2]
    adapprox_ds.attach(engine)
    optimizer = adapprox_of(engine)
    assert {int(s["step"]) for s in optimizer.state.values()} == {HALF}
    # At stage 3 the stock loader gives all groups group 0's settings: ours may not name any
    # that differ (DeepSpeed's fault B3).
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    follow(engine, record)
    engine.destroy()


def convert_by_deepspeed(source: Path, output: Path) -> None:
    """On rank 0, by DeepSpeed's own converter."""
    if torch.distributed.get_rank() == 0:
        output.parent.mkdir()
        names = ("num_extract_workers", "num_merge_workers", "strict", "inject_missing_state")
        options = {**dict.fromkeys(names, 1), "keep_temp_folder": False}
        folders = {"input_folder": str(source), "output_folder": str(output)}
        ds_to_universal.main(Namespace(**folders, **options))
    torch.distributed.barrier()


def stock_convert(source: str, kind: str, folder: Path) -> None:
    """DeepSpeed's converter reads our checkpoint; its dense result loads either way."""
    record, run = record_of(source, folder)
    output = folder / "root" / "stock_universal"
    convert_by_deepspeed(run / TAG, output)
    for name, saved in record["saved"].items():
        content = torch.load(output / "zero" / name / "exp_avg_sq.pt")
        v = content["param"] if isinstance(content, dict) else content
        torch.testing.assert_close(v.reshape(-1), saved["v"], rtol=1e-6, atol=1e-12)
    engine, _ = start(kind, empty=True)
    load_universal(engine, output.parent)
    found = gather(engine)
    for name, saved in record["saved"].items():
        assert torch.equal(found[name]["fp32"], saved["fp32"])
        assert torch.equal(found[name]["exp_avg"], saved["exp_avg"])
    assert {int(s["step"]) for s in adapprox_of(engine).state.values()} == {HALF}
    follow(engine, record)
    engine.destroy()
    if KINDS[source.rsplit("_", 1)[0]].stage == KINDS[kind].stage:
        engine, _ = stock_engine(kind, checkpoint={"load_universal": True})
        engine.load_checkpoint(str(output.parent))
        follow(engine, record)
        engine.destroy()


def load_unnamed(source: str, kind: str, folder: Path) -> None:
    """An optimizer that knows its parameters by their place in the groups."""
    record, run = record_of(source, folder)
    engine, _ = stock_engine(kind, named=False)
    load_universal(engine, run)
    names = read_placement(engine).names
    assert set(names) != set(names.values())
    optimizer = adapprox_of(engine)
    for shard in read_placement(engine).shards:
        for part in shard.layout.fragments:
            f = part.fragment
            saved = record["saved"][names[f.name]]["fp32"][f.start : f.start + f.numel]
            assert torch.equal(shard.flat.detach()[f.offset : f.offset + f.numel], saved)
    assert {int(s["step"]) for s in optimizer.state.values()} == {HALF}
    engine.destroy()


def keep_settings(source: str, kind: str, folder: Path) -> None:
    """``load_groups=False``: the run's own rank limit holds, and what it cuts is the least."""
    record, run = record_of(source, folder)
    engine, _ = start(kind, empty=True)
    load_universal(engine, run, load_groups=False)
    limit = KINDS[kind].knobs["rank_max"]
    assert {g["rank_max"] for g in adapprox_of(engine).param_groups} == {limit}
    recompressed = compare_second_moment(engine, {**record, "rank_max": limit})
    assert recompressed, "nothing was truncated: the case tests less than it says"
    engine.destroy()


def other_factors(source: str, kind: str, folder: Path, converted: bool = False) -> None:
    """Factors of V into a run that factors its root, and back: factored anew, method kept.

    So is what the first moment is the mean of; it is converted where the saved one is another.
    """
    record, run = record_of(source, folder)
    engine, _ = start(kind, empty=True)
    own = [dict(group) for group in adapprox_of(engine).param_groups]
    load_universal(engine, run)
    optimizer = adapprox_of(engine)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        for key in ("warm_start", "power_iterations", "momentum", "nesterov", "clip_threshold"):
            assert group[key] == before[key]
    found = gather(engine)
    for name, saved in record["saved"].items():
        assert torch.equal(found[name]["fp32"], saved["fp32"])
        assert relative(found[name]["v"].sqrt(), saved["v"].sqrt()) < 0.3, name
    firsts = [torch.equal(found[n]["exp_avg"], x["exp_avg"]) for n, x in record["saved"].items()]
    assert all(firsts) != converted
    domains = {s["exp_avg_sq"].store.domain for s in optimizer.state.values()}
    assert domains == {"std" if own[0]["warm_start"] else "variance"}
    train(engine, HALF, HALF + 2)
    engine.destroy()


def damage(run: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A changed copy of a universal checkpoint, made by rank 0."""
    copy = folder / f"damaged_{change.__name__}"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(run / f"{TAG}_universal", copy)
        change(copy)
    torch.distributed.barrier()
    return copy


PARAM = "zero/cells.w1.weight"


def truncated(c: Path) -> None:
    path = c / PARAM / "exp_avg.pt"
    path.write_bytes(path.read_bytes()[:-200])


def missing_file(c: Path) -> None:
    (c / PARAM / "exp_avg_sq.pt").unlink()


def missing_first_moment(c: Path) -> None:
    (c / PARAM / "exp_avg.pt").unlink()


def missing_parameter(c: Path) -> None:
    shutil.rmtree(c / PARAM)


def other_shape(c: Path) -> None:
    files.write(c / PARAM / "fp32.pt", {"param": torch.zeros(48, 57)})


def other_frozen(c: Path) -> None:
    files.write(c / files.FROZEN / "cells.frozen.weight.pt", torch.zeros(1, 2))


def other_groups(c: Path) -> None:
    change_manifest(c, lambda m: m["parameters"].update({"cells.norm.weight": ((3,), 0)}))


def other_version(c: Path) -> None:
    change_manifest(c, lambda m: m.update(format_version=99))


def other_moment_version(c: Path) -> None:
    path = c / PARAM / "exp_avg_sq.pt"
    content = torch.load(path)
    with patch("adapprox_ds.adapprox.factors.FORMAT_VERSION", 98):
        files.write(path, content)


def unfinished(c: Path) -> None:
    (c / files.UNFINISHED).write_text("")


def foreign_object(c: Path) -> None:
    files.write(c / PARAM / "exp_avg.pt", {"param": Path("x")})


def change_manifest(c: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = torch.load(c / files.MANIFEST)
    change(manifest)
    files.write(c / files.MANIFEST, manifest)


FAULTS: dict[Callable[[Path], None], str] = {
    truncated: r"cells\.w1\.weight/exp_avg\.pt cannot be read",
    missing_file: r"cells\.w1\.weight/exp_avg_sq\.pt is missing",
    missing_first_moment: r"cells\.w1\.weight/exp_avg\.pt is missing",
    missing_parameter: r"lacks zero/cells\.w1\.weight",
    other_shape: r"fp32\.pt has shape \(48, 57\) where the model has \(48, 56\)",
    other_frozen: r"'cells\.frozen\.weight' with shape \(1, 2\) where the model has \(6, 5\)",
    other_groups: r"'cells\.norm\.weight' is in parameter group 0 .* and in 1 of the optimizer",
    other_version: "format version 99; this release of adapprox_ds reads 1",
    other_moment_version: "format version 98",
    unfinished: "interrupted conversion",
    foreign_object: "an object that is not safe to load",
}


def faults(source: str, kind: str, folder: Path) -> None:
    """Each is named by an error on every rank, and the engine trains on as if nothing had been."""
    _, run = record_of(source, folder)
    engine, _ = start(kind)
    train(engine, 0, 2)
    before, settings = gather(engine), [dict(g) for g in adapprox_of(engine).param_groups]
    for change, message in FAULTS.items():
        with pytest.raises(CheckpointError, match=message):
            load_universal(engine, damage(run, folder, change))
    with pytest.raises(CheckpointError, match="python -m adapprox_ds convert"):
        load_universal(engine, run / TAG)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_universal(engine, folder / "nowhere")
    fail_half_way(engine, run)
    after = gather(engine)
    for name, values in before.items():
        assert all(torch.equal(after[name][key], values[key]) for key in values)
    assert settings == [dict(g) for g in adapprox_of(engine).param_groups]
    assert (engine.global_steps, engine.lr_scheduler.last_batch_iteration) == (2, 1)
    train(engine, 2, 3)
    after = gather(engine)
    engine.destroy()
    engine, _ = start(kind)
    train(engine, 0, 3)
    for name, values in gather(engine).items():
        assert all(torch.equal(after[name][key], values[key]) for key in values)
    engine.destroy()


def fail_half_way(engine: Any, run: Path) -> None:
    """The last rank alone fails once it has written something: an error on all, no rank waits."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    for place in ("factored.write_mean", "load._write_weights", "load._install_engine_state"):
        module, name = place.split(".")
        real = getattr(import_module(f"adapprox_ds.checkpoint.{module}"), name)

        def fails(*args: Any, real: Callable[..., None] = real) -> None:
            real(*args)
            if last:
                raise MemoryError("no room here")

        with (
            patch(f"adapprox_ds.checkpoint.{place}", fails),
            pytest.raises(CheckpointError, match="no room here"),
        ):
            load_universal(engine, run)


def safe_files(source: str, kind: str, folder: Path) -> None:
    """All files of ours load with weights_only=True, without DeepSpeed's classes where none is."""
    _, run = record_of(source, folder)
    paths = [p for p in (run / f"{TAG}_universal").rglob("*.pt") if "model_states" not in p.name]
    assert len(paths) > 20
    for path in paths:
        with torch.serialization.safe_globals(files.deepspeed_globals()):
            torch.load(path, weights_only=True)


def killed(source: str, kind: str, folder: Path) -> None:
    """A converter that dies at its n-th write leaves nothing that loads; the next one finishes."""
    _, run = record_of(source, folder)
    output, n = folder / "out_universal", 0
    finished = False
    while not finished:
        n = n + 1 if n < 3 else n * 2
        pid = os.fork()
        if pid == 0:
            writes = iter(range(n))
            real = Path.replace

            def replace(path: Path, target: Path, writes: Any = writes, real: Any = real) -> Path:
                if next(writes, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(path, target)

            with patch.object(Path, "replace", replace):
                convert(run / TAG, output, workers=1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        finished = status == 0
        if finished:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        left = [p for p in (output, output.with_name("out_universal.incomplete")) if p.exists()]
        if output.exists():  # killed between the rename and latest_universal
            inspect(output)
            shutil.rmtree(output)
            continue
        assert not (folder / files.LATEST_UNIVERSAL).exists()
        for path in left:
            with pytest.raises(CheckpointError, match="interrupted conversion"):
                inspect(path)
    assert n > 8
    assert (folder / files.LATEST_UNIVERSAL).read_text() == output.name
    inspect(folder)


CASES: dict[str, Callable[[Path], None]] = {
    "stock_load_z1": partial(stock_load, "z1_2", "z1"),
    "stock_load_z1_to_z3": partial(stock_load, "z1_2", "z3"),
    "stock_load_z3": partial(stock_load, "z3_2", "z3"),
    "stock_load_z3_to_bf16": partial(stock_load, "z3_2", "bf16"),
    "stock_convert_z1": partial(stock_convert, "z1_2", "z1"),
    "stock_convert_z1_to_z3": partial(stock_convert, "z1_2", "z3"),
    "stock_convert_z3": partial(stock_convert, "z3_2", "z3"),
    "unnamed_z1": partial(load_unnamed, "z1_2", "z2"),
    "unnamed_z3": partial(load_unnamed, "z1_2", "z3_sub"),
    "variance_to_std": partial(other_factors, "z1_paper_2", "z3_update"),
    "std_to_variance": partial(other_factors, "z1_2", "z3_paper", converted=True),
    "low_rank_limit": partial(keep_settings, "z3_2", "z2_low"),
    "faults_z1": partial(faults, "z1_2", "z1"),
    "faults_z3": partial(faults, "z1_2", "z3"),
    "safe_files_fp16": partial(safe_files, "z3_init_2", ""),
    "killed": partial(killed, "z1_2", ""),
}
