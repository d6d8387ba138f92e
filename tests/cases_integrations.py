# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/integrations: each trains, saves and resumes to the same weights.

Run by test_integrations.py, those whose tool is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from tests.cases_trainers import CONFIGS, ROOT, check_factored, reset_accelerate

RECIPES = ROOT / "examples/integrations"
STEPS, HALF = 4, 2


def recipe(name: str) -> ModuleType:
    """A script of the folder, imported anew, as if it were started there."""
    reset_accelerate()
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def trained_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights that are not frozen by name, whole, on every rank."""
    members = engine.module.named_parameters()
    return {n: safe_get_full_fp32_param(p).clone() for n, p in members if p.requires_grad}


def keep_half(folder: Path) -> Path:
    """A folder with the first of the two checkpoints of ``folder/run`` alone."""
    resumed = folder / "resumed"
    if torch.distributed.get_rank() == 0:
        name = f"checkpoint-{HALF}"
        shutil.copytree(folder / "run" / name, resumed / name)
    torch.distributed.barrier()
    return resumed


def whole_and_resumed(run: Callable[[Path, bool], Any], folder: Path) -> Any:
    """Train ``STEPS`` steps, then from the checkpoint in the middle; the same weights to the bit.

    Returns:
        The trainer of the second run.
    """
    whole = run(folder / "run", False)
    assert whole.args.world_size == 2
    assert check_factored(whole.deepspeed).metrics().step == STEPS
    weights = trained_weights(whole.deepspeed)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    whole.deepspeed.destroy()
    resumed = run(keep_half(folder), True)
    assert resumed.state.global_step == STEPS
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == losses
    found = trained_weights(resumed.deepspeed)
    assert found.keys() == weights.keys()
    assert [name for name in found if not torch.equal(found[name], weights[name])] == []
    return resumed


def trl(name: str, config: str, folder: Path, *more: str) -> Any:
    """A recipe of TRL, of a model that is loaded from a folder as people load theirs."""
    model = folder / "model"
    if torch.distributed.get_rank() == 0:
        made, tokenizer = recipe(name).model_and_tokenizer(None)
        made.save_pretrained(model)
        tokenizer.save_pretrained(model)
    torch.distributed.barrier()

    def run(output: Path, resume: bool) -> Any:
        line = f"--deepspeed {CONFIGS[config]} --model {model} --output {output} --lr 4e-3"
        line += f" --steps {STEPS} --save-steps {HALF}" + " --resume" * resume
        return recipe(name).main([*line.split(), *more])

    return whole_and_resumed(run, folder)


def losses_of(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def sft(config: str, folder: Path, *more: str) -> None:
    """It learns; with ``--lora`` nothing but adapters."""
    done = trl("trl_sft", config, folder, *more)
    assert losses_of(done)[-1] < losses_of(done)[0]
    trained = [name for name, p in done.deepspeed.module.named_parameters() if p.requires_grad]
    assert all(("lora_" in name) == ("--lora" in more) for name in trained)
    groups = adapters_or_weights(done)
    assert groups == ([0.1] if "--lora" in more else [0.1, 0.0])
    done.deepspeed.destroy()


def adapters_or_weights(trainer: Any) -> list[float]:
    """The weight decay of each group."""
    return [group["weight_decay"] for group in check_factored(trainer.deepspeed).param_groups]


def dpo(config: str, folder: Path, *more: str) -> None:
    """The policy moves away from the reference, whose weights stay what they were."""
    done = trl("trl_dpo", config, folder, *more)
    assert losses_of(done)[-1] < losses_of(done)[0]
    if "--lora" in more:
        assert done.ref_model is None
    else:
        from transformers import AutoModelForCausalLM

        reset_accelerate()
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
        policy = trained_weights(done.deepspeed)
        reference = whole_reference(done.ref_model)
        assert reference.keys() == loaded.keys()
        assert all(torch.equal(reference[name], loaded[name]) for name in loaded)
        assert not any(torch.equal(policy[name], loaded[name]) for name in loaded)
        done.ref_model.destroy()
    done.deepspeed.destroy()


def whole_reference(engine: Any) -> dict[str, Tensor]:
    """The weights of an engine without an optimizer, gathered where ZeRO-3 cut them."""
    import deepspeed

    members = dict(engine.module.named_parameters())
    cut = [p for p in members.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut):
        return {name: p.detach().clone() for name, p in members.items()}


def grpo(config: str, folder: Path) -> None:
    """Completions are generated from the weights that Adapprox steps."""
    done = trl("trl_grpo", config, folder)
    rewards = [row["reward"] for row in done.state.log_history if "reward" in row]
    assert len(rewards) == STEPS
    done.deepspeed.destroy()


CASES: Mapping[str, Callable[[Path], None]] = {
    "sft_zero2": partial(sft, "zero2"),
    "sft_zero3": partial(sft, "zero3"),
    "sft_lora": lambda folder: sft("zero3", folder, "--lora"),
    "dpo_zero2": partial(dpo, "zero2"),
    "dpo_zero3": partial(dpo, "zero3"),
    "dpo_lora": lambda folder: dpo("zero2", folder, "--lora"),
    "grpo_zero2": partial(grpo, "zero2"),
    "grpo_zero3": partial(grpo, "zero3"),
}
