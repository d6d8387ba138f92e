# SPDX-License-Identifier: Apache-2.0
"""Kills ranks in a step, in ``save_checkpoint`` and in a conversion. Run by test_killing.py.

python -m tests.faults.killing SCRATCH SEED CASE=KILLS...
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # what takes seconds, once
import torch
import torch._dynamo

import adapprox_ds
from adapprox_ds.__main__ import main
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.checkpoint import CheckpointError, last_finished
from adapprox_ds.checkpoint.finished import steps_of
from adapprox_ds.checkpoint.folder import open_universal
from adapprox_ds.core.kernels import native_build, squares
from tests.faults.cases_nonfinite import Pair, bits, step
from tests.faults.ranks import Bomb, fork, join, logs_of, run_ranks
from tests.zero.cases_stages import Z2, Z3, Case, config_of

#: The step that the unbroken run counts calls in, and saves after.
COUNTED = 3


def engine_of(zero: dict[str, Any] | None) -> Any:
    """A new engine; gradients come from the number of steps done."""
    case = Case(zero, knobs={"lr": 1e-2, "rank_max": 4, "first_moment": "int8"})
    return adapprox_ds.initialize(model=Pair(), config=config_of(case))[0]


def digest(engine: Any) -> int:
    """Of all that this rank keeps."""
    value = 0
    for tensor in bits(engine):
        value = crc32(tensor.to_dense().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def train_once(engine: Any) -> None:
    """The next step."""
    step(engine, engine.global_steps)


def unbroken(zero: dict[str, Any], root: Path, steps: int, rank: int) -> None:
    """Digests of every step, and how many calls a step and a save make."""
    engine, digests = engine_of(zero), []
    calls = {}
    for _ in range(steps):
        with Bomb() as counting:
            train_once(engine)
        digests.append(digest(engine))
        if engine.global_steps == COUNTED:
            calls["step"] = counting.calls
            with Bomb() as counting:
                engine.save_checkpoint(str(root / "counted"))
            calls["save"] = counting.calls
    (root / f"unbroken{rank}.json").write_text(json.dumps({"digests": digests, "calls": calls}))


def broken(
    zero: dict[str, Any], root: Path, phase: str, victim: int, part: float, rank: int
) -> None:
    """Go on from the last finished checkpoint, and die at ``part`` of the phase's calls."""
    known = json.loads((root / f"unbroken{rank}.json").read_text())
    runs = root / "runs"
    engine = engine_of(zero)

    def check() -> None:
        assert digest(engine) == known["digests"][engine.global_steps - 1], engine.global_steps

    if runs.exists():
        engine.load_checkpoint(str(runs), tag=last_finished(runs).name)
        check()
    train_once(engine)
    check()
    if phase == "save" or not runs.exists():
        engine.save_checkpoint(str(runs))
        train_once(engine)
        check()
    torch.distributed.barrier()
    with Bomb(1 + int(part * known["calls"][phase]) if rank == victim else None):
        if phase == "step":
            train_once(engine)
        else:
            engine.save_checkpoint(str(runs))


def chain(world: int, zero: dict[str, Any], root: Path, kills: int, seed: int) -> None:
    """One run that is killed again and again, now in a step, now in a save."""
    choose = random.Random(seed)
    logs, runs = root, root / "runs"
    codes = run_ranks(world, partial(unbroken, zero, root, 2 * kills + 8), logs)
    assert codes == [0] * world, logs_of(logs)
    done, misled = 0, 0
    for i in range(2 * kills):
        phase = ("save", "step")[i % 2]
        victim, part = choose.randrange(world), choose.random()
        codes = run_ranks(world, partial(broken, zero, root, phase, victim, part), logs)
        assert codes[victim] == -signal.SIGKILL, f"{i} {phase}: {codes}\n{logs_of(logs)}"
        found = steps_of(last_finished(runs))
        assert found >= done + (phase == "save"), f"{i}: {found} after {done}"
        done = found
        misled += points_nowhere(runs)
        for old in sorted(runs.glob("global_step*"), key=lambda p: int(p.name[11:]))[:-3]:
            shutil.rmtree(old)
    print(f"{2 * kills} kills, {done} steps; latest named no finished checkpoint {misled} times")


def points_nowhere(runs: Path) -> bool:
    """Whether DeepSpeed left ``latest`` at what cannot be loaded; ``inspect`` says what can."""
    try:
        steps_of(runs / (runs / "latest").read_text())
    except (CheckpointError, OSError):
        said = io.StringIO()
        with redirect_stderr(said):
            assert main(["inspect", str(runs)]) == 1
        assert f"The last finished one is {last_finished(runs)}" in said.getvalue()
        return True
    return False


def saved(root: Path) -> Path:
    """A checkpoint of two ranks."""
    assert run_ranks(2, partial(unbroken, Z2, root, COUNTED), root) == [0, 0], logs_of(root)
    return root / "counted" / f"global_step{COUNTED}"


def contents(folder: Path) -> dict[str, int]:
    """Every file of a universal checkpoint."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): crc32(p.read_bytes()) for p in files}


def converting(arguments: list[str], bomb: Bomb, counts: Path | None) -> None:
    """The command line, until the bomb goes off."""
    torch.set_num_threads(1)
    with bomb:
        assert main(arguments) == 0
    if counts is not None:
        counts.write_text(str(bomb.calls))


def conversions(root: Path, kills: int, seed: int) -> None:
    """A conversion that is killed leaves nothing that loads, or all of it; the next one works."""
    source, choose = saved(root), random.Random(seed)
    whole, output = root / "whole" / "u", root / "again" / "u"
    log, counts = root / "convert.log", root / "calls"
    alone = ["--num_merge_workers", "1"]
    first = partial(converting, ["convert", str(source), str(whole), *alone], Bomb(), counts)
    assert join([fork(first, log)]) == [0], logs_of(root)
    expected, calls = contents(whole), int(counts.read_text())
    for i in range(kills):
        again = i % 3 == 2  # over a finished one
        if again:
            over = ["convert", str(source), str(output), *alone, "--overwrite"]
            assert join([fork(partial(converting, over, Bomb(), None), log)]) == [0]
        at = 1 + int(choose.random() * calls)
        arguments = ["convert", str(source), str(output), *alone, "--overwrite"]
        code = join([fork(partial(converting, arguments, Bomb(at), None), log)])
        assert code == [-signal.SIGKILL], f"{i}: {code}\n{logs_of(root)}"
        pointer = output.parent / "latest_universal"
        if again or pointer.exists():
            open_universal(output.parent / pointer.read_text())
        if output.exists():
            open_universal(output)
            assert contents(output) == expected, f"{i}"
        if not again and output.exists():
            shutil.rmtree(output)
            pointer.unlink(missing_ok=True)
    arguments = ["convert", str(source), str(output), "--overwrite"]
    assert join([fork(partial(converting, arguments, Bomb(), None), log)]) == [0], logs_of(root)
    assert contents(output) == expected
    assert sorted(p.name for p in output.parent.iterdir()) == ["latest_universal", "u"]


def killed_worker(root: Path) -> None:
    """Out of memory in one worker, say: an error, no hang, and nothing that loads."""
    source, output = saved(root), root / "u"

    def work() -> None:
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGKILL))
        said = io.StringIO()
        with redirect_stderr(said):
            assert main(["convert", str(source), str(output)]) == 1
        assert "one of 2 worker processes was killed, perhaps for memory" in said.getvalue()

    assert join([fork(work, root / "convert.log")]) == [0], logs_of(root)
    assert not output.exists() and not (root / "latest_universal").exists()


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file of this process grows beyond ``limit`` bytes; after it, its log may again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def full_disk_converting(root: Path) -> None:
    """Files stop growing at several sizes: a clear error, and the next conversion works."""
    source, output = saved(root), root / "full" / "u"

    def work(limit: int, workers: int) -> None:
        torch.set_num_threads(1)
        said = io.StringIO()
        with redirect_stderr(said), files_up_to(limit):
            code = main(["convert", str(source), str(output), "--num_merge_workers", str(workers)])
        assert code == 1
        assert "error: " in said.getvalue() and "cannot be written" in said.getvalue(), said
        assert "make room on its disk, and convert again" in said.getvalue()

    for limit, workers in ((0, 1), (1 << 10, 1), (1 << 11, 2), (3 << 10, 1)):
        code = join([fork(partial(work, limit, workers), root / "convert.log")])
        assert code == [0], f"{limit}: {logs_of(root)}"
        assert not output.exists() and not (output.parent / "latest_universal").exists()
    done = partial(converting, ["convert", str(source), str(output)], Bomb(), None)
    assert join([fork(done, root / "convert.log")]) == [0], logs_of(root)
    open_universal(output)
    assert [p.name for p in output.parent.glob("*.incomplete")] == []


def full_disk_saving(root: Path) -> None:
    """One rank cannot write its file: its error, and the checkpoint before is found and loads."""
    zero, runs = Z2, root / "runs"

    def work(rank: int) -> None:
        engine = engine_of(zero)
        train_once(engine)
        engine.save_checkpoint(str(runs))
        train_once(engine)
        with files_up_to(2000 if rank == 1 else resource.RLIM_INFINITY):
            engine.save_checkpoint(str(runs))

    codes = run_ranks(2, work, root)
    assert codes[1] == 1, logs_of(root)
    assert "unexpected pos" in logs_of(root)  # torch's words, which docs/faults.md explains
    assert last_finished(runs) == runs / "global_step1"
    points_nowhere(runs)  # or it names the first: rank 0 was killed in time

    def again(rank: int) -> None:
        engine = engine_of(zero)
        engine.load_checkpoint(str(runs), tag=last_finished(runs).name)
        train_once(engine)
        engine.save_checkpoint(str(runs))

    assert run_ranks(2, again, root) == [0, 0], logs_of(root)
    assert last_finished(runs) == runs / "global_step2"

    def stage0(rank: int) -> None:
        engine = engine_of(None)
        train_once(engine)
        engine.save_checkpoint(str(root / "stage0"))

    assert run_ranks(1, stage0, root) == [0], logs_of(root)
    assert steps_of(last_finished(root / "stage0")) == 1


CASES: dict[str, Callable[[Path, int, int], None]] = {
    "one_rank": partial(chain, 1, Z3),
    "two_ranks": partial(chain, 2, Z2),
    "converting": conversions,
    "converting_workers": lambda root, kills, seed: killed_worker(root),
    "full_disk_converting": lambda root, kills, seed: full_disk_converting(root),
    "full_disk_saving": lambda root, kills, seed: full_disk_saving(root),
}


if __name__ == "__main__":
    scratch, seed, *chosen = sys.argv[1:]
    torch.set_num_threads(1)
    for library in (native_pass.LIBRARY, squares.LIBRARY):
        native_build.load(library)
    # DeepSpeed collects garbage several times an engine; see tests/preloaded.py.
    gc.freeze()
    outcomes = {}
    for name, kills in (case.split("=") for case in chosen):
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            CASES[name](folder, int(kills), int(seed))
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    (Path(scratch) / "outcomes.json").write_text(json.dumps(outcomes))
