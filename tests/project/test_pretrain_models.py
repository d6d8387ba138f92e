# SPDX-License-Identifier: Apache-2.0
"""The pretraining example's models, BERT's masks, and what a config may leave open."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from adapprox_ds.report.model_shapes import MODELS
from masking import IGNORED, MaskedWindowSampler
from modeling import SIZES, build_model, count_parameters
from recipes import RECIPES, complete
from sampling import WindowSampler
from tests import ROOT

#: AdamW's megabytes (2^20 bytes) in the paper's Table 8: two fp32 moments a parameter.
TABLE_8 = {"gpt2-117m": 949.40, "gpt2-345m": 2707.09}


@pytest.mark.parametrize("name", TABLE_8)
def test_gpt2_has_the_papers_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(SIZES[name])
    assert count_parameters(model.parameters()) * 8 / 2**20 == pytest.approx(
        TABLE_8[name], abs=0.005
    )
    assert SIZES[name].context == 1024


def test_bert_base_has_its_shapes() -> None:
    with torch.device("meta"):
        model = build_model(SIZES["bert-base"])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == MODELS["bert-base"]()


def masked(tokens: torch.Tensor, seed: int = 0) -> MaskedWindowSampler:
    return MaskedWindowSampler(WindowSampler(tokens, 100, seed=0), 1000, mask_id=1000, seed=seed)


def test_masks_hide_what_they_should() -> None:
    """15 % of each window: 80 % hidden, 10 % another token, 10 % as they were."""
    tokens = torch.randint(1000, (100_001,), generator=torch.Generator().manual_seed(0))
    inputs, targets = masked(tokens).batch(0, 1000)
    originals, _ = WindowSampler(tokens, 100, seed=0).batch(0, 1000)
    chosen = targets != IGNORED
    assert torch.equal(chosen.sum(1), torch.full((1000,), 15))
    assert torch.equal(inputs[~chosen], originals[~chosen])
    assert torch.equal(targets[chosen], originals[chosen])
    hidden = inputs[chosen] == 1000
    kept = inputs[chosen] == originals[chosen]
    for part, wanted in ((hidden, 0.8), (kept, 0.1), (~hidden & ~kept, 0.1)):
        assert part.double().mean() == pytest.approx(wanted, abs=0.012)
    others = inputs[chosen][~hidden & ~kept]
    assert others.min() < 50
    assert 950 < others.max() < 1000
    assert (chosen.sum(0) > 90).all()  # at every place of the window


def test_masks_follow_from_seed_and_position() -> None:
    tokens = torch.arange(1000).repeat(3)[:1101]
    inputs, targets = masked(tokens).batch(4, 6)
    halves = [masked(tokens).batch(7, 3), masked(tokens).batch(4, 3)]
    for whole, part in zip((inputs, targets), range(2), strict=True):
        assert torch.equal(whole, torch.cat([halves[1][part], halves[0][part]]))
    assert not torch.equal(targets, masked(tokens, seed=1).batch(4, 6)[1])
    # The same eleven windows in the next epoch, otherwise masked.
    epochs = [masked(tokens).batch(first, 11) for first in (0, 11)]
    counts = [(targets != IGNORED).sum(0) for _, targets in epochs]
    assert not torch.equal(*counts)


def test_config_that_leaves_all_open_gets_the_papers_schedule() -> None:
    config = json.loads((ROOT / "examples" / "pretrain" / "ds_recipe.json").read_text())
    filled = complete(config, RECIPES["gpt2-117m"])
    assert filled["train_batch_size"] == 128
    lr = filled["optimizer"]["params"]["lr"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = WarmupCosineLR(optimizer, **filled["scheduler"]["params"])
    rates = {}
    for step in (500, 1_000, 50_500, 100_000):
        schedule.step(step)
        rates[step] = schedule.get_lr()[0]
    wanted = {500: 1.5e-4, 1_000: 3e-4, 50_500: 1.75e-4, 100_000: 5e-5}
    assert rates == pytest.approx(wanted, rel=2e-3)
    assert "lr" not in config["optimizer"]["params"]


def test_what_a_config_says_stays() -> None:
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        config = json.loads(path.read_text())
        assert complete(config, RECIPES["gpt2-345m"]) == config, path.name


def test_steps_default_to_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import parse_arguments

    config = ROOT / "examples" / "pretrain" / "ds_recipe.json"
    command = ["train.py", "--deepspeed_config", str(config), "--model", "bert-base"]
    monkeypatch.setattr(sys, "argv", command)
    assert parse_arguments().steps == 200_000
