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

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor

import adapprox_ds
from adapprox_ds.integrations.trainer import CheckOptimizer
from tests.zero.cases_trainers import CONFIGS, ROOT, check_factored, reset_accelerate

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
    assert whole.args.world_size == torch.distributed.get_world_size()
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
    assert decays(done) == ([0.1] if "--lora" in more else [0.1, 0.0])
    done.deepspeed.destroy()


def decays(trainer: Any) -> list[float]:
    """The weight decay of each group."""
    return [group["weight_decay"] for group in check_factored(trainer.deepspeed).param_groups]


def dpo(config: str, folder: Path, *more: str) -> None:
    """The policy moves away from the reference, whose weights stay what they were."""
    done = trl("trl_dpo", config, folder, *more)
    assert losses_of(done)[-1] < losses_of(done)[0]
    if "--lora" in more:
        assert done.ref_model is None
    else:
        loaded = load_file(folder / "model" / "model.safetensors")
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


def tiny(output: Path, **more: Any) -> dict[str, Any]:
    """A model, data, and what a TrainingArguments takes, for tools that bring a Trainer's kin."""
    script = recipe("recipe")
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (64, 16))
    return {
        "args": {
            "output_dir": str(output),
            "deepspeed": str(CONFIGS["zero2"]),
            "accelerator_config": script.accelerator_config(),
            "bf16": False,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,  # left to itself, ms-swift takes 16,
            "dataloader_num_workers": 0,  # and 1, which takes ten seconds to start
            "max_steps": STEPS,
            "save_steps": HALF,
            "logging_steps": 1,
            "learning_rate": 4e-3,
            "weight_decay": 0.1,
            "report_to": [],
            **more,
        },
        "model": script.model_and_tokenizer(None)[0],
        "train_dataset": [{"input_ids": t, "labels": t} for t in tokens],
    }


def axolotl(folder: Path) -> None:
    """By axolotl's plugin manager, its schema and its trainer; one rank.

    Its trainer resets what makes accelerate know the other CPU ranks (core/trainers/base.py,
    ``create_accelerator_and_postprocess``).
    """
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    manager = PluginManager.get_instance()
    manager.register("adapprox_ds.integrations.axolotl.AdapproxPlugin")
    assert len(manager.plugins) == 1
    assert all("adapprox" in schema.model_fields for schema in merge_input_args())
    cfg = DictDefault({"adapprox": {"rank_max": 4}, "adam_beta2": 0.95})

    def run(output: Path, resume: bool) -> Any:
        made = tiny(output, adam_beta2=0.95)
        args = AxolotlTrainingArguments(**made["args"])
        data = Dataset.from_list(made["train_dataset"])
        trainer = AxolotlTrainer(made["model"], args=args, train_dataset=data)
        manager.post_trainer_create(cfg, trainer)
        for callback in manager.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    done = whole_and_resumed(run, folder)
    optimizer = check_factored(done.deepspeed)
    found = [(g["initial_lr"], g["betas"], g["rank_max"]) for g in optimizer.param_groups]
    assert set(found) == {(4e-3, (0.9, 0.95), 4)}
    assert 0.0 in decays(done)
    assert 0.1 in decays(done)
    done.deepspeed.destroy()
    with pytest.raises(ValueError, match="loraplus_lr_ratio=16 does not go with Adapprox"):
        manager.post_trainer_create(DictDefault({"loraplus_lr_ratio": 16}), None)


def swift(folder: Path) -> None:
    """By ms-swift's loader of plugins, its table and what its trainers do with it."""
    import transformers
    from swift.optimizers import optimizers_map
    from swift.trainers.arguments import TrainingArguments
    from swift.trainers.mixin import SwiftMixin
    from swift.utils.utils import import_external_file

    plugin = import_external_file(str(RECIPES / "swift_adapprox.py"))
    for text in ("rank_max=4", "[4]"):
        with pytest.raises(ValueError, match="has to be arguments of Adapprox as JSON"):
            plugin.parsed(text)

    class SwiftTrainer(transformers.Trainer):
        """A Trainer with SwiftMixin's doors of the optimizer; its own wants a template."""

        create_optimizer_and_scheduler = SwiftMixin.create_optimizer_and_scheduler
        create_optimizer = SwiftMixin.create_optimizer
        create_scheduler = SwiftMixin.create_scheduler
        _disable_foreach_for_deepspeed = SwiftMixin._disable_foreach_for_deepspeed

        def __init__(self, args: Any, **more: Any) -> None:
            self.optimizer_callback = optimizers_map[args.optimizer](args, self)
            super().__init__(args=args, **more)

    def run(output: Path, resume: bool) -> Any:
        made = tiny(output, optimizer="adapprox", optim_args='{"rank_max": 4}', adam_beta2=0.95)
        trainer = SwiftTrainer(TrainingArguments(**made.pop("args")), **made)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    done = whole_and_resumed(run, folder)
    optimizer = check_factored(done.deepspeed)
    found = [(g["initial_lr"], g["betas"], g["rank_max"]) for g in optimizer.param_groups]
    assert set(found) == {(4e-3, (0.9, 0.95), 4)}
    assert decays(done) == [0.1, 0.0]
    done.deepspeed.destroy()


def llamafactory(folder: Path) -> None:
    """By the registry of LLaMA-Factory's v1 and its engine, with its own checkpoints."""
    from llamafactory.v1.config.arg_utils import get_plugin_config
    from llamafactory.v1.plugins.trainer_plugins.distributed.hub import DistributedPlugin
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

    recipe("llamafactory_v1")
    chosen = get_plugin_config({"name": "adapprox", "lr": 4e-3, "weight_decay": 0.1, "rank_max": 4})
    placed = get_plugin_config({"name": "deepspeed", "config_file": str(CONFIGS["zero2"])})
    deepspeed = DistributedPlugin("deepspeed")

    tokens = torch.stack([row["input_ids"] for row in tiny(folder)["train_dataset"]])

    def prepared() -> tuple[Any, Any, Any]:
        made = tiny(folder)
        engine = deepspeed(made["model"], placed, num_micro_batch=1, micro_batch_size=4)
        optimizer = OptimizerPlugin(chosen.name)(made["model"], chosen)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return engine, *engine.prepare(made["model"], optimizer, rates)[:2]

    def train(engine: Any, model: Any, steps: range) -> None:
        for step in steps:
            batch = tokens.roll(-8 * step, 0)[4 * torch.distributed.get_rank() :][:4]
            engine.backward(model(input_ids=batch, labels=batch).loss)

    engine, model, optimizer = prepared()
    train(engine, model, range(HALF))
    deepspeed.save_checkpoint(model, optimizer, str(folder / "half"))
    train(engine, model, range(HALF, STEPS))
    assert check_factored(model).metrics().step == STEPS
    assert [group["weight_decay"] for group in check_factored(model).param_groups] == [0.1, 0.0]
    weights = trained_weights(model)
    model.destroy()
    engine, model, optimizer = prepared()
    deepspeed.load_checkpoint(model, optimizer, str(folder / "half"))
    train(engine, model, range(HALF, STEPS))
    found = trained_weights(model)
    assert [name for name in found if not torch.equal(found[name], weights[name])] == []
    model.destroy()
    with pytest.raises(ValueError, match="optim_config has no lr"):
        OptimizerPlugin("adapprox")(None, get_plugin_config({"name": "adapprox"}))


def named(folder: Path) -> None:
    """The config that names Adapprox, in a Trainer whose optimizer is out of reach."""
    import transformers

    adapprox_ds.register()

    def run(output: Path, resume: bool) -> Any:
        made = tiny(output, deepspeed=str(RECIPES / "ds_zero2_named.json"), adam_beta2=0.95)
        trainer = transformers.Trainer(
            made["model"],
            transformers.TrainingArguments(**made["args"]),
            train_dataset=made["train_dataset"],
            callbacks=[CheckOptimizer()],
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    done = whole_and_resumed(run, folder)
    (group,) = check_factored(done.deepspeed).param_groups
    assert [group[key] for key in ("initial_lr", "betas", "weight_decay", "rank_max")] == [
        4e-3,
        (0.9, 0.95),
        0.1,
        8,
    ]
    done.deepspeed.destroy()


CASES: Mapping[str, Callable[[Path], None]] = {
    "sft_zero3": partial(sft, "zero3"),
    "sft_lora": lambda folder: sft("zero2", folder, "--lora"),
    "dpo_zero2": partial(dpo, "zero2"),
    "dpo_zero3": partial(dpo, "zero3"),
    "grpo_zero2": partial(grpo, "zero2"),
    "axolotl": axolotl,
    "named": named,
    "llamafactory": llamafactory,
    "swift": swift,
}
