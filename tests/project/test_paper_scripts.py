# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/paper that make the paper's figures and tables, at small sizes."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox
from tests import ROOT
from tests.project.cases_finetune import write_bert, write_sentences

SMALL = ["--width", "32", "--layers", "1", "--steps", "8"]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "examples/paper")
    monkeypatch.setattr(importlib.import_module("small_gpt"), "EVALUATION_WINDOWS", 64)
    return importlib.import_module


@pytest.fixture
def run(load: Callable[[str], ModuleType], tmp_path: Path) -> Run:
    """Runs a script; its result file, beside which its picture has to be if it draws one."""

    def call(name: str, *arguments: str) -> dict[str, Any]:
        module = load(name)
        module.main([*arguments, "--results", str(tmp_path)])
        if hasattr(module, "draw"):
            image = (tmp_path / f"{name}.png").read_bytes()
            assert image.startswith(b"\x89PNG")
        return json.loads((tmp_path / f"{name}.json").read_text())

    return call


def test_figure_1(run: Run, load: Callable[[str], ModuleType]) -> None:
    """Spectra of what AdamW really held, V's and its root's."""
    data = run("figure1_singular_values", *SMALL, "--top", "5")
    assert {name: row["shape"] for name, row in data["matrices"].items()} == {
        "attn.c_attn": [32, 96],
        "attn.c_proj": [32, 32],
        "mlp.c_fc": [32, 128],
        "mlp.c_proj": [128, 32],
    }
    for row in data["matrices"].values():
        for kind in ("V", "sqrt(V)"):
            values = row[kind]["singular_values"]
            assert len(values) == 32
            assert values[0] == 1.0
            assert values == sorted(values, reverse=True)
            # A matrix of entries >= 0: the first singular value towers above the others.
            assert values[1] < 0.7
        assert row["V"]["error"]["1"] > row["V"]["error"]["8"] > 0
    script = load("figure1_singular_values")
    known = script.spectrum(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    assert known == pytest.approx([1.0, 0.75, 0.0])
    assert script.error_at(known, 1) == pytest.approx(0.6)
    assert [script.rank_for(known, share) for share in (0.6, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]


def test_figure_2(run: Run, load: Callable[[str], ModuleType]) -> None:
    """The SVD is best, S-RSI next to it, and both fall with the rank."""
    data = run("figure2_error_time", *SMALL, "--matrix", "attn.c_attn", "--repeats", "2")
    for row in data["kinds"].values():
        assert row["ranks"] == [1, 2, 4, 8, 16]
        assert row["SVD"] == sorted(row["SVD"], reverse=True)
        for ours, best in zip(row["S-RSI"], row["SVD"], strict=True):
            assert best * (1 - 1e-5) <= ours < 1.1 * best
        assert row["SVD"][0] <= row["Adafactor"] < 1.0
        assert min(*row["S-RSI s"], row["SVD s"], row["Adafactor s"]) > 0
    script = load("figure2_error_time")
    v = torch.outer(torch.arange(1.0, 9.0), torch.arange(2.0, 15.0))
    assert all(script.approximate(v, kind, 1)["Adafactor"] < 1e-6 for kind in script.KINDS)


def test_tables_6_and_7(run: Run) -> None:
    """Errors over the optimum, which for a normal matrix is far above the paper's errors."""
    data = run("tables6_7_srsi", *SMALL, "--size", "256")
    normal = data["matrices"]["normal"]
    assert (normal["n"], normal["k"]) == (256, 64)
    # A quarter of the columns: 0.614 at any size that is not tiny.
    assert normal["optimum"] == pytest.approx(0.614, abs=0.005)
    assert normal["optimum"] > 4 * max(data["paper"]["l"])
    for row in data["matrices"].values():
        assert all(e > row["optimum"] for e in row["l"] + row["p"])
        assert row["l"][0] > row["l"][1] > row["l"][4]
        assert row["l"][9] < 1.03 * row["optimum"]
        assert row["l"][4] == row["p"][4]
        assert max(row["p"]) < 1.1 * min(row["p"])
    assert len(data["paper"]["l"]) == len(data["paper"]["p"]) == 10


def test_figure_3(run: Run) -> None:
    """A rank for every matrix and step; expansion starts at the bottom, reflection at the top."""
    data = run("figure3_ranks", "--steps", "4", "--rank-max", "6")
    starts = {"paper": 6, "default step": 6, "paper, expanding": 1}
    assert set(data["methods"]) == set(starts)
    for name, row in data["methods"].items():
        assert len(row["ranks"]) == 14  # 3 layers of 4 matrices, 2 embeddings
        assert all(len(ranks) == 4 and ranks[0] == starts[name] for ranks in row["ranks"].values())
        assert 1 <= row["least"] <= row["mean"] <= row["most"] <= 6
    expanding = data["methods"]["paper, expanding"]["ranks"].values()
    assert any(ranks[-1] > 1 for ranks in expanding)


def test_figure_4(run: Run) -> None:
    """Perplexities fall from that of guessing bytes."""
    names = ["AdamW", "Adapprox, default, k = 8"]
    data = run("figure4_perplexity", "--steps", "5", "--every", "2", "--only", *names)
    for name in names:
        found = data["optimizers"][name]["perplexity"]
        assert list(found) == ["2", "4", "5"]
        assert 256 > found["2"] > found["5"] > 1


def test_basins(load: Callable[[str], ModuleType]) -> None:
    """Of learning rates: the best mean, the rates within 1 % of it, where runs end far above it."""
    module = load("losses")
    runs = {1e-3: [2.5], 2e-3: [2.01, 2.01], 4e-3: [2.0, 2.0], 8e-3: [1.9, math.nan], 1e-2: [2.41]}
    row = module.row_of(runs, 2)
    assert (row["lr"], row["losses"]) == (4e-3, [2.0, 2.0])
    assert row["basin"] == [2e-3, 4e-3]
    assert row["diverged"] == [8e-3, 1e-2]
    assert row["runs"]["0.008"] == [1.9, None]  # JSON has no NaN
    again = module.runs_of({"AdamW": row})
    assert math.isnan(again.pop(("AdamW", 8e-3, 1)))
    assert again["AdamW", 2e-3, 1] == 2.01
    assert len(again) == 7


def test_nadamw_is_adapprox_without_factors(load: Callable[[str], ModuleType]) -> None:
    """On vectors, whose second moment is kept in full, the control and the default step agree."""
    control = load("peers").NAdamW
    start, gradients = torch.randn(64), torch.randn(12, 64)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (control([theirs], 1e-2), Adapprox([ours], 1e-2))
    for g in gradients:
        for p, optimizer in zip((theirs, ours), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_galore_projects_matrices_between_layers(load: Callable[[str], ModuleType]) -> None:
    """The embeddings and vectors go by the dense AdamW of the same package."""
    pytest.importorskip("pytorch_optimizer")
    shapes = {"wte.weight": (40, 24), "h.0.c_fc.weight": (24, 48), "h.0.c_fc.bias": (48,)}
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    optimizer = load("peers").PEERS["GaLore"](named, 1e-3)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = [tuple(optimizer.state[p]["exp_avg"].shape) for _, p in named]
    assert held == [(40, 24), (8, 48), (48,)]


def test_convergence(run: Run, load: Callable[[str], ModuleType]) -> None:
    """The problems are as the theorems want them, and the control has no error to feed back."""
    module = load("convergence")
    generator = torch.Generator().manual_seed(0)
    w = module.BEND * torch.randn(module.DIM, generator=generator)
    values = {}
    for convex in (False, True):
        problem = module.Problem(convex)
        second = torch.func.jacrev(
            lambda v, at=problem: at.gradient(v[None], at.x, at.y)[0]  # type: ignore[misc]
        )(w)
        torch.testing.assert_close(second, second.T)  # it is a gradient
        values[convex] = torch.linalg.eigvalsh(second)
    assert values[False][0] < -0.005
    # Least squares of a lower rank, whose gradients are at least as long as the condition says.
    empty = module.DIM - module.DIM // module.COPIES
    assert values[True][:empty].abs().max() < 1e-4 < 0.02 < values[True][empty]
    many = w + torch.randn(8, module.DIM, generator=generator)
    squares = problem.gradient(many, problem.x, problem.y).square().sum(-1)
    assert (squares >= 2 * values[True][empty] * problem.bounded(many)).all()

    p = torch.nn.Parameter(w[None].clone())
    optimizer = module.METHODS["MicroAdam, no feedback"][0]([{"params": [p], "lr": 0.1}])
    for given, is_zero in ((module.largest(w[None]), True), (w[None], False)):
        p.grad = given
        optimizer.step()
        assert (optimizer.state[p]["error"] == 0).all() == is_zero
    data = run("convergence", "--steps", "4", "8")
    for found in data["problems"].values():
        assert set(found["methods"]) == set(module.METHODS)
        for row in found["methods"].values():
            low, high = row["slope"][1:]
            assert low <= row["slope"][0] <= high
            assert row["bounded"][-1] == pytest.approx(min(row["by_c"].values()))
    assert data["problems"]["non-convex"]["slope"] == pytest.approx(-0.5)


def test_figure_5(run: Run) -> None:
    """Pairs at the best of the rates, of which one is useless."""
    names = ["Adafactor", "Adapprox"]
    data = run("figure5_first_moment", "--steps", "5", "--rates", "1e-9", "4e-3", "--only", *names)
    assert list(data["optimizers"]) == names
    for row in data["optimizers"].values():
        means = {}
        for kind in ("with", "without"):
            assert row[kind]["lr"] == 4e-3
            assert len(row[kind]["losses"]) == 2
            assert len(row[kind]["training_loss"]) == 5
            assert row[kind]["training_loss"][-1] < row[kind]["training_loss"][0]
            means[kind] = sum(row[kind]["losses"]) / 2
        # Five steps into a warm-up, a mean of gradients lags behind.
        assert means["without"] < means["with"] < math.log(256)
        assert row["without_minus_with"] == pytest.approx(means["without"] - means["with"])


def test_figure_5_tells_what_diverged(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that no training survives is reported, not drawn or averaged."""
    data = run("figure5_first_moment", "--steps", "3", "--rates", "1e4", "--only", "AdamW")
    row = data["optimizers"]["AdamW"]
    assert row["with"]["diverged"]
    assert row["without"]["losses"] is None
    assert "| AdamW | diverged | diverged |  |" in capsys.readouterr().out


def test_tables_3_and_5(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are chosen on the first seed; the encoder learns, a byte model stays near chance."""
    module = load("tables3_5_finetune")
    bert, sentences = write_bert(tmp_path / "bert"), write_sentences(tmp_path / "sentences.tsv")
    monkeypatch.setattr(module, "fetch_encoder", lambda _: bert)
    monkeypatch.setattr(module, "fetch_snippets", lambda _: sentences)
    monkeypatch.setattr(module, "RATES", {"GPT": (1e-3,), "encoder": (1e-9, 3e-3)})
    monkeypatch.setattr(module, "STEPS", {"GPT": 3, "encoder": 50})
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "PRETRAINING_STEPS", 3)
    with ThreadPoolExecutor(1) as pool:
        row = module.row_of("Adapprox, default, k = 8", 2, pool, True)
        small = module.row_of("MicroAdam", 1, pool, True)
        held = module.runs_of("MicroAdam", small)
        monkeypatch.setattr(module, "encoder", lambda task: (float(task[2]), 0))
        again = module.row_of("MicroAdam", 2, pool, False, held)
    assert row["encoder_lr"] == 3e-3
    assert row["encoder_sweep"]["1e-09"] < 0.75 < min(row["encoder"])
    assert [len(row[kind]) for kind in ("encoder", "gpt", "zero_shot")] == [2, 2, 2]
    assert all(0.3 < accuracy < 0.8 for accuracy in row["zero_shot"])
    # Of the second call one run alone is new.
    assert again == {**small, "encoder": [*small["encoder"], 1.0]}
    size = 4 * sum(p.numel() for p in module.load_encoder(bert).model.parameters())
    assert size < row["state_bytes"] < 2 * size
    assert small["state_bytes"] < size / 3 and "gpt" not in small


def test_scopes_at_scale(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Bytes fall with ranks where U is in parts, and the picture is drawn."""
    result = tmp_path / "scopes.json"
    arguments = ["--models", "gpt2-345m", "--worlds", "8", "64", "--result", str(result)]
    load("scopes_at_scale").main(arguments)
    rows = json.loads(result.read_text())["models"]["gpt2-345m"]["scopes"]
    held = {name: [row["second_bytes"] for row in of.values()] for name, of in rows.items()}
    assert held["matrix, U sharded"][1] < held["matrix, U sharded"][0] / 7
    assert held["matrix, U sharded"][0] < held["partition"][0] / 4
    assert all(row["exchanged_bytes"] == 0 for row in rows["matrix, U replicated"].values())
    assert result.with_suffix(".png").stat().st_size > 10_000
