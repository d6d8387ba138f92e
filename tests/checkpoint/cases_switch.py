# SPDX-License-Identifier: Apache-2.0
"""A run that goes from AdamW to Adapprox, or back, loses nothing. Run by test_universal.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import adapprox_ds
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.checkpoint import convert, load_universal
from tests.checkpoint.cases_moving import convert_by_deepspeed
from tests.zero.cases_stages import adapprox_of

BEFORE, AFTER = 60, 40
VOCABULARY, WIDTH, BATCH = 64, 32, 64
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}


class Bigram(nn.Module):
    """Predicts a Markov chain's next symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, 4 * WIDTH)
        self.out = nn.Linear(4 * WIDTH, VOCABULARY)

    def forward(self, symbols: Tensor, following: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(symbols)))
        return cross_entropy(self.out(hidden), following)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same on every rank."""
    chain = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1000 + step)
    # Rare symbols too: their second moments are small, as in language.
    symbols = (VOCABULARY * torch.rand(BATCH, generator=g).square()).long()
    following = torch.multinomial((3 * chain).softmax(1)[symbols], 1, generator=g).view(-1)
    return symbols, following


#: DeepSpeed's own, whose states count in numbers.
NATIVE: dict[str, Callable[..., Any]] = {
    "cpu_adam": deepspeed.ops.adam.DeepSpeedCPUAdam,
    "fused_adam": deepspeed.ops.adam.FusedAdam,
}
CPU = {"offload_optimizer": {"device": "cpu"}}


class Operators:
    """What DeepSpeed's Adams call, in torch: theirs take minutes to compile."""

    def load(self) -> Operators:
        return self

    def create_adam(self, *_: Any) -> None:
        pass

    def destroy_adam(self, *_: Any) -> None:
        pass

    def adam_update(self, _: int, step: int, *args: Any) -> None:
        lr, b1, b2, eps, decay, _, p, g, m, v = args
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        p.mul_(1 - lr * decay)
        p.addcdiv_(m / (1 - b1**step), (v / (1 - b2**step)).sqrt_() + eps, value=-lr)

    def multi_tensor_adam(self, _: int, __: Any, lists: Any, *args: Any) -> None:
        lr, b1, b2, eps, step, _, _, decay = args
        for g, p, m, v in zip(*lists, strict=True):
            self.adam_update(0, step, lr, b1, b2, eps, decay, True, p, g, m, v)


def start(name: str, stage: int, **more: Any) -> Any:
    """An engine of AdamW, or of Adapprox with the momentum that is its name."""
    torch.manual_seed(0)
    model = Bigram()
    config = {**CONFIG, "zero_optimization": {"stage": stage}, **more}
    if name in NATIVE:
        optimizer: Any = NATIVE[name](model.parameters(), **SETTINGS)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    params = {**SETTINGS, "rank_init": 8, "rank_max": 8, "momentum": name}
    config["optimizer"] = {"type": "Adapprox", "params": params}
    parameters = list(model.parameters())
    return adapprox_ds.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, first: int, last: int) -> Tensor:
    losses = []
    for step in range(first, last):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def noise() -> float:
    """The spread of the loss over batches, of a model that stands still."""
    torch.manual_seed(0)
    model = Bigram()
    with torch.no_grad():
        return float(torch.stack([model(*batch(step)) for step in range(50)]).std())


def before(name: str, stage: int, folder: Path) -> Tensor:
    """Train, save and convert; the losses of the run that goes on."""
    engine = start(name, stage)
    train(engine, 0, BEFORE)
    engine.save_checkpoint(str(folder / "run"), tag="s")
    unbroken = train(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    convert_on_rank_0(folder / "run", "as-saved" if name == "adamw" else "dense")
    return unbroken


def convert_on_rank_0(run: Path, second_moment: str, root: Path | None = None) -> None:
    if torch.distributed.get_rank() == 0:
        output = (root or run) / "s_universal"
        convert(run / "s", output, workers=1, second_moment=second_moment)
    torch.distributed.barrier()


def moments(folder: Path) -> dict[str, dict[str, Any]]:
    """By parameter: exp_avg, exp_avg_sq and step, as the files of a universal checkpoint say."""
    return {
        p.parent.name: {
            "exp_avg": torch.load(p)["param"],
            "exp_avg_sq": torch.load(p.with_name("exp_avg_sq.pt"))["param"],
            "step": torch.load(p.with_name("step.pt")),
        }
        for p in sorted((folder / "zero").glob("*/exp_avg.pt"))
    }


def denominator(saved: dict[str, Any]) -> Tensor:
    """What AdamW divides its first moment by: the root of the corrected v, and epsilon."""
    v = saved["exp_avg_sq"].double() + 0.0
    return (v / (1 - SETTINGS["betas"][1] ** float(saved["step"]))).sqrt() + 1e-8


def require_no_jump(switched: Tensor, unbroken: Tensor) -> None:
    """Batch by batch the two losses differ by less than batches do."""
    excess = switched - unbroken
    bound = noise()
    assert float(excess[:10].mean()) < bound / 2, f"{excess[:10]}, noise {bound}"
    assert float(excess.max()) < bound, f"{excess.max()}, noise {bound}"
    assert float(excess.mean()) < bound / 2, f"{excess.mean()}, noise {bound}"


def to_adapprox(momentum: str, stage: int, new_stage: int, folder: Path) -> None:
    unbroken = before("adamw", stage, folder)
    engine = start(momentum, new_stage)
    load_universal(engine, folder / "run")
    second = [s["exp_avg_sq"] for s in adapprox_of(engine).state.values()]
    assert all(isinstance(m, LowRankMoment) for m in second)
    group = adapprox_of(engine).param_groups[0]
    assert tuple(group["betas"]) == SETTINGS["betas"]
    assert group["momentum"] == momentum
    require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()
    # Taken for the other kind the first moment does make it jump: the measure sees what it should.
    engine = start(momentum, new_stage)
    load_universal(engine, folder / "run")
    group = adapprox_of(engine).param_groups[0]
    group["momentum"] = "update" if momentum == "gradient" else "gradient"
    with pytest.raises(AssertionError, match="noise"):
        require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()


def there_and_back(momentum: str, stage: int, new_stage: int, folder: Path) -> None:
    """AdamW's first moment after AdamW -> Adapprox -> AdamW; a mean of gradients to the bit."""
    before("adamw", stage, folder)
    engine = start(momentum, new_stage)
    load_universal(engine, folder / "run")
    engine.save_checkpoint(str(folder / "adapprox"), tag="s")
    engine.destroy()
    convert_on_rank_0(folder / "adapprox", "as-saved", folder / "held")
    convert_on_rank_0(folder / "adapprox", "dense", folder / "back")
    was, held, back = (moments(folder / name / "s_universal") for name in ("run", "held", "back"))
    assert len(was) == 5
    for name, saved in was.items():
        assert int(back[name]["step"]) == BEFORE
        if momentum == "gradient":
            assert torch.equal(held[name]["exp_avg"], saved["exp_avg"])
            assert torch.equal(back[name]["exp_avg"], saved["exp_avg"])
            continue
        expected = saved["exp_avg"].double() / denominator(saved)
        torch.testing.assert_close(held[name]["exp_avg"].double(), expected, rtol=1e-5, atol=1e-7)
        expected = expected * denominator(back[name])
        torch.testing.assert_close(back[name]["exp_avg"].double(), expected, rtol=1e-5, atol=1e-9)


def to_adamw(momentum: str, stage: int, folder: Path) -> None:
    unbroken = before(momentum, stage, folder)
    dense = moments(folder / "run" / "s_universal")
    convert_on_rank_0(folder / "run", "as-saved", folder / "held")
    held = moments(folder / "held" / "s_universal")
    for name, saved in held.items():
        assert torch.equal(saved["exp_avg_sq"] + 0.0, dense[name]["exp_avg_sq"])
        if momentum == "gradient":
            assert torch.equal(saved["exp_avg"], dense[name]["exp_avg"])
        else:
            expected = saved["exp_avg"].double() * denominator(saved)
            found = dense[name]["exp_avg"].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    engine = start("adamw", stage, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(str(folder / "run"))
    assert path is not None
    require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()
    # With a mean of updates AdamW does jump: the measure sees what it should.
    if torch.distributed.get_rank() == 0:
        for p in (folder / "run" / "s_universal" / "zero").glob("*/exp_avg.pt"):
            content = torch.load(p)
            content["param"] = (content["param"] / denominator(dense[p.parent.name])).float()
            torch.save(content, p)
    torch.distributed.barrier()
    engine = start("adamw", stage, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "run"))
    with pytest.raises(AssertionError, match="noise"):
        require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()


def deepspeeds(name: str, zero: dict[str, Any], new_stage: int, folder: Path) -> None:
    """From DeepSpeed's own Adams, natively and by either converter and loader."""
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    run, steps = folder / "run", 3

    def counted(engine: Any, expected: int) -> None:
        states = adapprox_of(engine).state.values()
        assert {float(s["step"]) for s in states if s} == {expected}
        train(engine, expected, expected + 1)
        assert {(float(s["step"]), s["step"].dim()) for s in states if s} == {(expected + 1, 0)}
        engine.destroy()

    with (
        patch("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder", Operators),
        patch("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", Operators),
    ):
        engine = start(name, 0, **config)
        train(engine, 0, steps)
        states = engine.optimizer.optimizer if zero["stage"] else engine.optimizer
        assert steps in [s["step"] for s in states.state.values()], "it counts in tensors by now"
        engine.save_checkpoint(str(run), tag="s")
        expected = train(engine, steps, steps + 1)
        engine.destroy()
    engine = start("gradient", 0, **config)
    engine.load_checkpoint(str(run))
    torch.testing.assert_close(train(engine, steps, steps + 1), expected)
    states = adapprox_of(engine).state.values()
    assert {float(s["step"]) for s in states if s} == {steps + 1}
    engine.destroy()
    if not zero["stage"]:
        return  # which converters do not take
    convert_on_rank_0(run, "as-saved")
    engine = start("gradient", new_stage)
    load_universal(engine, run)
    counted(engine, steps)
    convert_by_deepspeed(run / "s", folder / "stock" / "s_universal")
    engine = start("gradient", new_stage)
    load_universal(engine, folder / "stock")
    counted(engine, steps)
    engine = start("gradient", 0, **config, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "stock"))
    train(engine, steps, steps + 1)
    assert {int(s["step"]) for s in adapprox_of(engine).state.values() if s} == {steps + 1}
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    "adamw_z1_to_gradient_z1": partial(to_adapprox, "gradient", 1, 1),
    "adamw_z1_to_gradient_z3": partial(to_adapprox, "gradient", 1, 3),
    "adamw_z3_to_update_z2": partial(to_adapprox, "update", 3, 2),
    "adamw_z1_to_update_z3": partial(to_adapprox, "update", 1, 3),
    "there_and_back_gradient": partial(there_and_back, "gradient", 1, 3),
    "there_and_back_update": partial(there_and_back, "update", 3, 2),
    "gradient_z2_to_adamw": partial(to_adamw, "gradient", 2),
    "update_z3_to_adamw": partial(to_adamw, "update", 3),
    "cpu_adam_z2": partial(deepspeeds, "cpu_adam", {"stage": 2, **CPU}, 3),
    "fused_adam_z3": partial(deepspeeds, "fused_adam", {"stage": 3}, 1),
    "fused_adam_z0": partial(deepspeeds, "fused_adam", {"stage": 0}, 1),
}
