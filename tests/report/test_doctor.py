# SPDX-License-Identifier: Apache-2.0
"""``python -m adapprox_ds doctor``: what it says of this machine and of configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adapprox_ds.__main__ import main
from adapprox_ds.core.kernels import backends
from adapprox_ds.report.doctor import examine
from tests import ROOT

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def says(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and what is printed."""
    try:
        code = main(["doctor", "--seconds", "0", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    return code, capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_configs_are_well(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = says(capsys, str(path))
    config = json.loads(path.read_text())
    assert code == 0, text
    assert f"ZeRO stage {config['zero_optimization']['stage']}," in text
    kind = config["optimizer"]["type"]
    if kind == "AdamW":
        assert "DeepSpeed's AdamW: this package takes no part" in text
    else:
        assert f"{kind}, by adapprox_ds.initialize: lr=" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r'! combination .*offload_optimizer.device="nvme" is not supported: .*use "cpu"',
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"rank_max": 0}}},
            r"! optimizer +Adapprox: rank_max=0 is not allowed; allowed: ",
        ),
        (
            {"optimizer": {"type": "MicroAdam", "params": {"window_size": 3}}},
            r"! optimizer +MicroAdam: unknown parameter window_size=3; did you mean 'window'",
        ),
        ({"optimizer": {"type": "Muon"}}, r"  optimizer +DeepSpeed's Muon: this package takes no"),
        (
            {"bff16": {"enabled": True}},
            r"! config +'bff16' is no key of DeepSpeed's; did you mean 'bf16'\? It is ignored",
        ),
    ],
    ids=["refused", "value", "name", "another", "section"],
)
def test_what_a_config_would_do(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    base = {"optimizer": {"type": "Adapprox", "params": {}}, "zero_optimization": {"stage": 2}}
    path.write_text(json.dumps(base | change))
    code, text = says(capsys, str(path))
    assert re.search(said, text), text
    assert code == int(said.startswith("!"))


def test_files_that_are_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name, said in (("absent.json", "no such file"), ("broken.json", "cannot be read")):
        code, text = says(capsys, str(tmp_path / name))
        assert code == 1 and said in text, text


def test_kernels_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was asked for by the environment and is not to be had is an error, with the reason."""
    monkeypatch.setenv(backends.VARIABLE, "triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, text = says(capsys)
    assert code == 1
    assert len(re.findall(r"! kernels of \w+ +ADAPPROX_KERNELS=triton, but its kernels", text)) == 2


def test_the_time_of_a_step() -> None:
    found = {f.what: f.found for f in examine(seconds=0.01)}
    ratio = re.match(r"([\d.]+) x fused AdamW's \(([\d.]+) to ([\d.]+)\)", found["time of a step"])
    assert ratio is not None
    middle, least, most = map(float, ratio.groups())
    assert 0 < least <= middle <= most
