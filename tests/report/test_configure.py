# SPDX-License-Identifier: Apache-2.0
"""``python -m adapprox_ds configure``: what it chooses, keeps, says and refuses.

That what it writes trains is in tests/zero/cases_configs.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapprox_ds.__main__ import main
from adapprox_ds.report.configure import configure
from adapprox_ds.report.estimate import Estimate, estimate, parse_size
from adapprox_ds.report.model_shapes import load_shapes

GIB = 2**30
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.95], "torch_adam": True, "weight_decay": 0.1},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "bf16": {"enabled": True},
}


def base(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(BASE) | changes


def said(reasons: list[str], start: str) -> str:
    """The one line on something."""
    (line,) = [reason for reason in reasons if reason.startswith(start)]
    return line


@pytest.mark.parametrize(
    ("gpus", "memory", "stage", "offload", "first_moment", "masters"),
    [
        (8, 80, 2, None, "fp32", "fp32"),
        (8, 27, 2, None, "int8", "fp32"),
        (8, 24, 3, None, "fp32", "fp32"),
        (8, 12, 3, None, "int8", "compensated"),
        (2, 24, 2, "cpu", "fp32", "fp32"),
    ],
)
def test_the_fastest_that_fits_is_taken(
    gpus: int, memory: int, stage: int, offload: str | None, first_moment: str, masters: str
) -> None:
    """Each smaller one is the next that is tried; its bytes are the estimator's."""
    model = "llama-3-8b"
    done = configure(model, gpus=gpus, memory=memory * GIB)
    zero = done.config["zero_optimization"]
    assert zero["stage"] == stage, done.reasons
    assert zero.get("offload_optimizer", {}).get("device") == offload
    assert done.config["optimizer"]["params"]["first_moment"] == first_moment
    names = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    flags = dict.fromkeys(names, True) if masters == "compensated" else {}
    assert done.config["bf16"] == {"enabled": True} | flags
    rounding = done.config["optimizer"]["params"].get("weight_rounding")
    assert rounding == ("compensated" if flags else None)
    shapes = load_shapes(model)
    e = estimate(shapes, stage=stage, world=gpus, first_moment=first_moment, masters=masters)
    states = e.parameters
    if offload is None:
        states += e.gradients + e.master + e.adapprox[8].largest
    assert f"a GPU holds {states / GIB:,.2f} GiB of states" in said(done.reasons, "a GPU holds")
    if offload is not None:
        host = 2 * (2 * e.master + e.adapprox[8].largest)
        assert f"{host / GIB:,.2f} GiB for all of them" in said(done.reasons, "a GPU holds")


def test_a_line_for_each_choice() -> None:
    """With the numbers that decided."""
    reasons = configure("llama-3-8b", gpus=8, memory=27 * GIB).reasons
    assert "of which 5.40 GiB are left to activations and buffers (a fifth;" in reasons[0]
    line = said(reasons, 'optimizer.params.first_moment = "int8": "fp32" needs 29.72 GiB, "bf16" ')
    assert line.endswith("trains as fp32 does within noise")
    reasons = configure("llama-3-8b", gpus=8, memory=24 * GIB, activations=GIB).reasons
    assert "(a fifth" not in reasons[0]


@pytest.mark.parametrize("given", [None, "AdamW", "Adapprox"])
@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_the_first_moment_that_is_asked_for(kind: str, given: str | None) -> None:
    """It is taken though another would be, with a new config and with the user's."""
    params = {"lr": 1e-3, **({"first_moment": "int8"} if given == "Adapprox" else {})}
    of_user = None if given is None else base() | {"optimizer": {"type": given, "params": params}}
    done = configure("gpt2-124m", gpus=8, memory=80 * GIB, first_moment=kind, base=of_user)
    assert done.config["optimizer"]["params"].get("first_moment", "fp32") == kind
    assert said(done.reasons, f'optimizer.params.first_moment = "{kind}": as you asked')


def test_a_first_moment_that_cannot_be_had() -> None:
    """A name that is none, one where there is none, and one that alone does not fit."""
    with pytest.raises(ValueError, match="first_moment='int2' is not allowed; allowed: fp32, bf16"):
        configure("gpt2-124m", gpus=8, memory=80 * GIB, first_moment="int2")
    params = {"lr": 1e-3, "betas": [0.0, 0.999]}
    given = base() | {"optimizer": {"type": "Adapprox", "params": params}}
    with pytest.raises(ValueError, match="first_moment='int8' is not allowed with betas"):
        configure("gpt2-124m", gpus=8, memory=80 * GIB, first_moment="int8", base=given)
    with pytest.raises(ValueError, match='first_moment="fp32", a GPU needs'):
        configure("llama-3-70b", gpus=1, memory=8 * GIB, first_moment="fp32")


def test_a_given_config_is_kept() -> None:
    """All but the optimizer; of that, what means the same; the given one is left as it was."""
    given = base()
    done = configure("llama-3-8b", gpus=8, memory=80 * GIB, base=given)
    assert given == BASE
    params = {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
    assert done.config == base(optimizer={"type": "Adapprox", "params": params})
    assert list(done.config) == list(BASE)
    assert said(done.reasons, "optimizer: AdamW's lr, betas, weight_decay mean the same")
    assert "torch_adam left out" in said(done.reasons, "optimizer: torch_adam")
    tight = configure("llama-3-8b", gpus=8, memory=27 * GIB, base=given)
    assert tight.config["optimizer"]["params"] == params | {"first_moment": "int8"}


@pytest.mark.parametrize(
    ("change", "params", "line"),
    [
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}},
            {"weight_decay": 0.1},
            "optimizer: weight_decay was added to the gradient and is now decoupled",
        ),
        ({"optimizer": None}, {"lr": 3e-4}, "optimizer: none in the config; lr = 3e-4"),
        (
            {"optimizer": {"type": "Adapprox", "params": {"rank_max": 4, "seed": 3}}},
            {"rank_max": 4, "seed": 3},
            "optimizer: Adapprox's own parameters are kept",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}},
            {"lr": "auto", "betas": "auto"},
            'optimizer.params.first_moment = "fp32": it fits as it was',
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"betas": [0.0, 0.99]}}},
            {"betas": [0.0, 0.99]},
            'optimizer.params.first_moment = "none": beta_1 is 0',
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"preset": "paper"}}},
            {"preset": "paper"},
            'optimizer.params.first_moment = "fp32": it fits as it was',
        ),
        ({"bf16": {"enabled": "auto"}}, None, 'bf16.enabled = "auto": counted as true'),
        (
            {"bf16": {}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 0}},
            None,
            "note: fp16 at ZeRO stage 0: DeepSpeed divides gradients",
        ),
    ],
    ids=["adam", "none", "ours", "auto", "no first", "preset", "auto dtype", "warned"],
)
def test_what_is_taken_over(
    change: dict[str, Any], params: dict[str, Any] | None, line: str
) -> None:
    done = configure("gpt2-124m", gpus=2, memory=80 * GIB, base=base(**change))
    assert said(done.reasons, line)
    if params is not None:
        assert done.config["optimizer"] == {"type": "Adapprox", "params": params}


@pytest.mark.parametrize(
    ("change", "states"),
    [
        ({}, lambda e: e.parameters + e.gradients),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, lambda e: e.parameters + 2 * e.gradients),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            lambda e: e.gradients,
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
            lambda e: 2 * -(-e.numel // 8) + e.gradients,
        ),
    ],
    ids=["plain", "wide gradients", "offloaded weights", "nothing whole"],
)
def test_what_a_given_config_makes_a_gpu_hold(
    change: dict[str, Any], states: Callable[[Estimate], int]
) -> None:
    """The optimizer's part is the same in all."""
    given = base(**change)
    done = configure("gpt2-124m", gpus=8, memory=80 * GIB, base=given)
    stage = given["zero_optimization"]["stage"]
    e = estimate(load_shapes("gpt2-124m"), stage=stage, world=8)
    held = states(e) + e.master + e.adapprox[8].largest
    assert f"a GPU holds {held / 2**20:,.2f} MiB of states" in said(done.reasons, "a GPU holds")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"type": "Lion"}}, "optimizer.type='Lion' is not allowed: its learning"),
        (
            {"optimizer": {"type": "Adapprox", "params": {"rank_max": 0}}},
            "rank_max=0 is not allowed",
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"rank_maximum": 8}}},
            "rank_maximum",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device="nvme" is not supported',
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "zero_hpz_partition_size=8 is not allowed: its bytes are not counted",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4 is not allowed"),
    ],
    ids=["optimizer", "value", "name", "nvme", "hpz", "stage"],
)
def test_what_cannot_be_kept(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        configure("gpt2-124m", gpus=2, memory=80 * GIB, base=base(**change))
    assert message in str(raised.value)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_masters_of_a_given_config_are_counted(rounding: str) -> None:
    """In bf16, with the byte that a compensation takes."""
    names = ("enabled", "bf16_master_weights_and_grads", "bf16_optimizer_states")
    optimizer = {"type": "Adapprox", "params": {"weight_rounding": rounding}}
    given = base(bf16=dict.fromkeys(names, True), optimizer=optimizer)
    done = configure("gpt2-124m", gpus=8, memory=80 * GIB, base=given)
    masters = "compensated" if rounding == "compensated" else "bf16"
    e = estimate(load_shapes("gpt2-124m"), stage=2, world=8, masters=masters)
    held = e.parameters + e.gradients + e.master + e.adapprox[8].largest
    assert f"a GPU holds {held / 2**20:,.2f} MiB of states" in said(done.reasons, "a GPU holds")
    assert done.config == given


def test_what_cannot_fit_is_refused_by_how_much() -> None:
    """And what would do: more GPUs, or what the given config rules out."""
    e = estimate(load_shapes("gpt2-345m"), stage=3, world=4)
    memory, activations = e.parameters + 50 * 2**20, 100 * 2**20
    with pytest.raises(ValueError, match="gpt2-345m does not fit on 4 GPUs") as raised:
        configure("gpt2-345m", gpus=4, memory=memory, activations=activations)
    assert "at least, with stage 3, optimizer on the CPU and" in str(raised.value)
    assert str(raised.value).endswith("50.00 MiB too much; 8 GPUs are enough")
    with pytest.raises(ValueError, match=r'at least, with stage 2 and first_moment="int8"') as left:
        configure("llama-3-8b", gpus=8, memory=24 * GIB, base=base())
    assert 'too much; stage 3 with first_moment="fp32" fits' in str(left.value)
    # Small parameters are whole on every GPU: no number of these is enough.
    with pytest.raises(ValueError, match=r"MiB too much$"):
        configure("gpt2-124m", gpus=1, memory=10**5, activations=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("512MiB", 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "80G", "-1GiB", "0GiB", "GiB", "80XiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=f"size {text!r} is not allowed; allowed: "):
        parse_size(text)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config to standard output or a new file, the reasons to the error stream."""
    arguments = ["configure", "--model", "gpt2-124m", "--gpus", "8", "--memory", "80GiB"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    config = json.loads(printed.out)
    assert config["zero_optimization"] == {"stage": 2}
    assert printed.err.startswith("gpt2-124m: 124.44 M parameters on 8 GPUs of 80.00 GiB")
    given, output = tmp_path / "mine.json", tmp_path / "new.json"
    given.write_text(json.dumps(BASE))
    assert main([*arguments, "--from", str(given), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert json.loads(output.read_text())["scheduler"] == BASE["scheduler"]
    for more, message in (
        (["-o", str(output)], "File exists"),
        (["--from", "absent.json"], "--from absent.json: no such file"),
        (["--from", __file__], "cannot be read"),
        (["--gpus", "0"], "gpus=0 is not allowed; allowed: 1 to"),
        (["--activations", "80GiB"], "is not allowed; allowed: less than memory"),
        (["--model", "gpt5"], "model='gpt5' is not allowed; allowed: gpt2-124m"),
        (["--memory", "20MiB"], "does not fit on 8 GPUs of 20.00 MiB"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*arguments, *more])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
