# SPDX-License-Identifier: Apache-2.0
"""The examples of the Hugging Face Trainer and of accelerate, and the blocks of docs/trainers.md.

Run by test_trainers.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.adapprox.moment import LowRankMoment
from tests import ROOT

CONFIGS = {
    "zero2": ROOT / "examples/hf_trainer/ds_zero2.json",
    "zero3": ROOT / "examples/hf_trainer/ds_zero3.json",
    "offload": ROOT / "examples/accelerate/ds_zero2_offload.json",
}
STEPS, HALF = 6, 3
BLOCKS = dict(
    zip(
        ("trainer", "trainer_json", "accelerate", "lightning"),
        re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainers.md").read_text(), re.DOTALL),
        strict=True,
    )
)


def reset_accelerate() -> None:
    """Forget what accelerate keeps of the case before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fresh(example: str) -> ModuleType:
    """The script of an example, imported anew, with a model size for tests."""
    reset_accelerate()
    path = ROOT / "examples" / example / "train.py"
    spec = importlib.util.spec_from_file_location(f"{example}_train", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tiny = sys.modules["modeling"].ModelSize(1, 64, 2, context=32, vocab_size=1024)
    script.SIZES["test"] = tiny
    return script


def arguments(config: str | Path, folder: Path, steps: int = STEPS) -> list[str]:
    """A command line. The checkpoint falls inside an epoch of two batches, the second one."""
    path = CONFIGS.get(str(config), config)
    line = f"--deepspeed {path} --corpus {folder.parent / 'text'} --output {folder / 'run'} "
    line += f"--model test --steps {steps} --save-steps {HALF} --batch 6 --lr 4e-3"
    return line.split()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights by name, whole, on every rank."""
    return {n: safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters()}


def check_factored(engine: Any) -> Adapprox:
    """The optimizer inside is Adapprox, and its second moments are factors."""
    optimizer = adapprox_ds.attach(engine)
    assert type(optimizer) is Adapprox
    moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
    assert all(isinstance(moment, LowRankMoment) for moment in moments)
    metrics = optimizer.metrics()
    assert metrics.parameters
    assert metrics.state_bytes < 0.8 * metrics.adamw_state_bytes
    return optimizer


def run_trainer(config: str, folder: Path, *more: str) -> tuple[Any, list[float]]:
    """One run of examples/hf_trainer/train.py."""
    trainer = fresh("hf_trainer").main([*arguments(config, folder), *more])
    assert trainer.args.world_size == 2
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    return trainer, losses


def trainer(config: str, folder: Path) -> None:
    """Trains; weights decay as the Trainer means them to."""
    done, losses = run_trainer(config, folder)
    assert losses[-1] < losses[0] - 0.1
    optimizer = check_factored(done.deepspeed)
    assert optimizer.metrics().step == STEPS
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    recorded = [{entry.param.ndim for entry in group} for group in optimizer.shards.recorded]
    if config != "zero3":  # which leaves parameters without a shape
        assert recorded == [{2}, {1}]
    torch.save((full_weights(done.deepspeed), losses), folder / "record.pt")
    done.deepspeed.destroy()


def resume_trainer(config: str, folder: Path) -> None:
    """Goes on from the checkpoint in the middle, to the same bits as the unbroken run."""
    source = folder.parent / f"trainer_{config}"
    checkpoint = folder / "run" / f"checkpoint-{HALF}"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source / "run" / checkpoint.name, checkpoint)
    torch.distributed.barrier()
    written = (checkpoint / "latest").stat().st_mtime_ns
    done, losses = run_trainer(config, folder, "--resume")
    # Else it began anew, to the same end.
    assert (checkpoint / "latest").stat().st_mtime_ns == written
    weights, whole = torch.load(source / "record.pt")
    assert losses == whole
    for name, found in full_weights(done.deepspeed).items():
        assert torch.equal(found, weights[name]), name
    done.deepspeed.destroy()


def accelerate(config: str, folder: Path) -> None:
    """Trains, with each rank on its own batches."""
    engine, losses = fresh("accelerate").main(arguments(config, folder))
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    optimizer = check_factored(engine)
    assert optimizer.metrics().step == STEPS
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.0  # the cosine's end
    assert AcceleratorState().num_processes == 2
    torch.save((full_weights(engine), losses), folder / "record.pt")
    engine.destroy()


def resume_accelerate(config: str, folder: Path) -> None:
    """``--resume`` goes on with the batches, rates and weights of the unbroken run."""
    source = folder.parent / f"accelerate_{config}"
    checkpoint = source / "run" / f"step-{HALF}"
    line = [*arguments(config, folder), "--resume", str(checkpoint)]
    engine, losses = fresh("accelerate").main(line)
    weights, whole = torch.load(source / "record.pt")
    assert losses == whole[HALF:]
    for name, found in full_weights(engine).items():
        assert torch.equal(found, weights[name]), name
    engine.destroy()


def swapped(example: str, folder: Path) -> None:
    """CPU offload with the flag left at its default: a clear error before the first step."""
    config = json.loads(CONFIGS["offload"].read_text())
    del config["zero_force_ds_cpu_optimizer"]
    path = folder / f"rank{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(config))
    message = r"DeepSpeedCPUAdam, not Adapprox.*zero_force_ds_cpu_optimizer\": false"
    # The operator takes minutes to compile, and no step is made with it.
    with (
        patch("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder"),
        pytest.raises(RuntimeError, match=message),
    ):
        fresh(example).main(arguments(path, folder, steps=1))


def run_block(name: str, folder: Path, text: str) -> dict[str, Any]:
    """What a block of docs/trainers.md leaves behind, run in ``folder``."""
    reset_accelerate()
    space: dict[str, Any] = {"__name__": "block"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(text, f"docs/trainers.md, {name}", "exec"), space)
    finally:
        os.chdir(before)
    return space


def block(name: str, folder: Path) -> None:
    """A block of docs/trainers.md trains with Adapprox, on the CPU where it says so."""
    with running_on_cpu() if name == "lightning" else nullcontext():
        space = run_block(name, folder, BLOCKS[name])
    if name == "lightning":
        engine = space["trainer"].strategy.deepspeed_engine
    else:
        engine = space["model"] if name == "accelerate" else space["trainer"].deepspeed
    optimizer = check_factored(engine)
    assert optimizer.metrics().step >= 5
    assert engine.zero_cpu_offload()
    rates = [group.get("initial_lr") for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    if name == "trainer":
        assert (rates, decays) == ([1e-3, 1e-3], [0.1, 0.0])
    if name == "trainer_json":
        assert (rates, decays) == ([1e-3], [0.1])


@contextmanager
def running_on_cpu() -> Iterator[None]:
    """Lightning's DeepSpeedStrategy without its refusal of CPUs."""
    from pytorch_lightning import strategies

    class OnCPU(strategies.DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)  # DeepSpeed wants an index

        def setup_environment(self) -> None:
            strategies.DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    with patch.object(strategies, "DeepSpeedStrategy", OnCPU):
        yield


def clipping_default(folder: Path) -> None:
    """Without "gradient_clipping" in the config, max_grad_norm is without effect."""
    text = BLOCKS["trainer"].replace("max_steps=5", "max_steps=1, max_grad_norm=0.5")
    for line, norm in (("", 1.0), ('    "gradient_clipping": "auto",\n', 0.5)):
        changed = text.replace('    "gradient_clipping": "auto",\n', line)
        engine = run_block("trainer", folder, changed)["trainer"].deepspeed
        assert engine.gradient_clipping() == norm
        engine.destroy()


def scheduler_by_rank(folder: Path) -> None:
    """accelerate moves a prepared scheduler on by a step a rank, unless told not to."""
    for told, epochs in ((True, 2), (False, 1)):
        reset_accelerate()
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
            step_scheduler_with_optimizer=told,
        )
        model = torch.nn.Linear(8, 8)
        optimizer = Adapprox(model.named_parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
        engine, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        accelerator.backward(engine(torch.ones(1, 8)).sum())
        scheduler.step()
        assert scheduler.scheduler.last_epoch == epochs
        engine.destroy()


def lora(stage: int, new_stage: int, folder: Path) -> None:
    """peft's adapters, which the Trainer saves without the model: on at another stage."""
    from peft import LoraConfig, get_peft_model

    def run(at: int, steps: int, *callbacks: Any) -> Any:
        script = fresh("hf_trainer")
        transformers.set_seed(0)
        layers = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        made = transformers.Trainer(
            model=get_peft_model(script.build_model(script.SIZES["test"]), layers),
            args=transformers.TrainingArguments(
                output_dir=str(folder / f"run{at}"),
                deepspeed={
                    "train_micro_batch_size_per_gpu": "auto",
                    "zero_optimization": {"stage": at},
                },
                accelerator_config=script.accelerator_config(),
                max_steps=steps,
                save_steps=HALF,
                report_to=[],
            ),
            train_dataset=script.windows(torch.arange(32 * 256) % 1000, 32),
            optimizer_cls_and_kwargs=(Adapprox, {"lr": 1e-2, "rank_max": 2}),
            callbacks=list(callbacks),
        )
        for callback in callbacks:
            callback.trainer = made
        made.train()
        return made.deepspeed

    def trained(engine: Any) -> dict[str, Tensor]:
        members = engine.module.named_parameters()
        return {n: safe_get_full_fp32_param(p).clone() for n, p in members if p.requires_grad}

    class Moves(transformers.TrainerCallback):
        trainer: Any

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            adapprox_ds.load_universal(self.trainer.deepspeed, folder / "moved")
            found = trained(self.trainer.deepspeed)
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[name], saved[name]) for name in saved)

    engine = run(stage, HALF)
    saved = trained(engine)
    assert all("lora_" in name for name in saved)
    assert any(name.endswith("lora_B.default.weight") and p.any() for name, p in saved.items())
    engine.destroy()
    checkpoint = folder / f"run{stage}" / f"checkpoint-{HALF}" / f"global_step{HALF}"
    if torch.distributed.get_rank() == 0:
        adapprox_ds.convert(checkpoint, folder / "moved", workers=1)
    torch.distributed.barrier()
    engine = run(new_stage, 1, Moves())
    assert {int(s["step"]) for s in adapprox_ds.attach(engine).state.values()} == {HALF + 1}
    check_factored(engine)
    engine.destroy()


CASES: Mapping[str, Callable[[Path], None]] = {
    **{f"trainer_{c}": partial(trainer, c) for c in ("zero2", "zero3")},
    **{f"accelerate_{c}": partial(accelerate, c) for c in ("zero2", "offload")},
    **{f"resume_trainer_{c}": partial(resume_trainer, c) for c in ("zero2", "zero3")},
    "resume_accelerate_zero2": partial(resume_accelerate, "zero2"),
    **{f"swapped_{e}": partial(swapped, e) for e in ("hf_trainer", "accelerate")},
    "lora_z2_to_z2": partial(lora, 2, 2),
    "lora_z3_to_z3": partial(lora, 3, 3),
    "lora_z2_to_z3": partial(lora, 2, 3),
    "clipping_default": clipping_default,
    "scheduler_by_rank": scheduler_by_rank,
    **{f"block_{name}": partial(block, name) for name in BLOCKS},
}
