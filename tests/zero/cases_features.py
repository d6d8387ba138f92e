# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed that are in no other suite, against the oracle.

And the cases of cases_expectations.py, in one world. Run by test_features.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from torch.nn.functional import linear, mse_loss
from transformers import LlamaConfig, LlamaForCausalLM

import adapprox_ds
from tests.zero.cases_expectations import CASES as EXPECTATIONS
from tests.zero.cases_expectations import Plain, build, same, settings, weights
from tests.zero.cases_expectations import step as plain_step
from tests.zero.cases_stages import (
    CPU,
    Z2,
    Z3,
    Case,
    advance,
    check,
    config_of,
    oracles,
    start,
    train,
)

STEPS = 3


def run(
    case: Case,
    folder: Path,
    by: Callable[[Any, Case, int], None] = train,
    mpu: Any = None,
) -> None:
    """Train and compare after every step."""
    engine, model = start(case, mpu)
    naive = oracles(case, torch.distributed.get_world_size())
    for step in range(STEPS):
        by(engine, case, step)
        if step != case.overflow_at:
            advance(case, naive, step)
        check(case, engine, model, naive)
    engine.destroy()


def in_halves(
    engine: Any,
    case: Case,
    step: int,
    together: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """One step of two backward passes, of which the caller says when they are done."""
    factor = 2.0 if torch.distributed.get_rank() == 0 else 0.0
    with together(engine):
        for _ in range(2):
            engine.backward(engine(step, factor / 2))
    engine.step()


def reduced_once(engine: Any, case: Case, step: int) -> None:
    """The same, and gradients are reduced once for both."""
    in_halves(engine, case, step, lambda engine: engine.coalesce_grad_reduction())


def compiled(folder: Path) -> None:
    """A module that was compiled trains as one that was not: hooks on gradients fire inside."""
    results = []
    for compiles in (False, True):
        engine = build(Plain(), settings(Z2), "json")
        if compiles:
            engine.compile(backend="eager")
        for seed in range(2):
            plain_step(engine, seed)
        results.append(weights(engine))
    assert same(*results)


def sequence_parallel(folder: Path) -> None:
    """Shards lie on ranks that share sequences, over which gradients are added.

    At stage 3 DeepSpeed averages them.
    """

    def by(engine: Any, case: Case, step: int) -> None:
        factor = 2.0 if case.stage == 3 else 1.0
        engine.backward(engine(step, factor if torch.distributed.get_rank() == 0 else 0.0))
        engine.step()

    parallel_state_sp.initialize_sequence_parallel(2)
    try:
        run(Case(Z2, "bf16"), folder, by, mpu=parallel_state_sp)
        run(Case(Z3, "bf16", "instance"), folder, by, mpu=parallel_state_sp)
    finally:
        groups.mpu = None


def tensor_parallel(folder: Path) -> None:
    """AutoTP: ranks hold parts of matrices, which DeepSpeed made before the optimizer was built."""
    batch = torch.arange(32).reshape(2, 16) % 61
    results = []
    for how in ("initialize", "attach"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
        case = Case({"stage": 1}, "bf16", how, extra={"tensor_parallel": {"autotp_size": 2}})
        if how == "initialize":
            engine = adapprox_ds.initialize(model=model, config=config_of(case))[0]
        else:
            optimizer = adapprox_ds.Adapprox(list(model.named_parameters()), **case.arguments)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case))[
                0
            ]
            adapprox_ds.attach(engine)
        assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
        losses = []
        for _ in range(4):
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.1, losses
        results.append([p.detach().clone() for p in model.parameters()])
        groups.mpu = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def frozen_later(folder: Path) -> None:
    """Stage 0: what is frozen after ``initialize`` stays, whatever gradients DeepSpeed gives it."""
    for method in ("default", "micro"):
        case = Case(None, "bf16", method=method)
        engine, model = start(case)
        train(engine, case, 0)
        wrapper = engine.optimizer
        trained, frozen = (model.cells[name].weight for name in ("w1", "w2"))
        frozen.requires_grad_(False)
        before = [p.detach().clone() for p in (trained, frozen)]
        parameters, copies = (sum(x, []) for x in (wrapper.fp16_groups, wrapper.fp32_groups))
        copy = next(q for p, q in zip(parameters, copies, strict=True) if p is frozen)
        master = copy.detach().clone()
        for _ in range(2):  # by hand, as the loss of the model needs all its gradients
            trained.grad = torch.ones_like(trained)
            wrapper.step()
        assert torch.equal(frozen, before[1]), method
        assert torch.equal(copy.detach(), master), method
        assert not torch.equal(trained, before[0]), method
        engine.destroy()


class Tied(torch.nn.Linear):
    """Both ends of a pipeline."""

    def __init__(self) -> None:
        super().__init__(12, 12, bias=False)


def tied_pipeline(folder: Path) -> None:
    """Two stages that share a weight train as one module does in plain torch."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(3, 12, generator=generator) for _ in range(2))
    for zero in (None, {"stage": 1}):
        layers = [
            TiedLayerSpec("ends", Tied),
            LayerSpec(torch.nn.Linear, 12, 12),
            torch.nn.Tanh(),
            LayerSpec(torch.nn.Linear, 12, 12),
            TiedLayerSpec("ends", Tied),
        ]
        model = PipelineModule(layers, num_stages=2, loss_fn=mse_loss)
        start_values: dict[str, torch.Tensor] = {}
        for i, name in enumerate(PIPELINE):
            shape = (12,) if name.endswith("bias") else (12, 12)
            start_values[name] = torch.randn(shape, generator=torch.Generator().manual_seed(i)) / 4
        here = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in here.items():
                p.copy_(start_values[name])
        engine = adapprox_ds.initialize(
            model=model, model_parameters=list(model.parameters()), config=config_of(Case(zero))
        )[0]
        whole = {name: torch.nn.Parameter(value.clone()) for name, value in start_values.items()}
        plain = adapprox_ds.Adapprox(list(whole.items()), **Case().arguments)
        for _ in range(STEPS):
            engine.train_batch(iter([(x, y)]))
            ends = whole["tied_modules.ends.weight"]
            hidden = linear(linear(x, ends), whole["1.weight"], whole["1.bias"]).tanh()
            out = linear(linear(hidden, whole["3.weight"], whole["3.bias"]), ends)
            plain.zero_grad()
            mse_loss(out, y).backward()
            plain.step()
        for name, p in here.items():
            assert torch.allclose(p.detach(), whole[name].detach(), rtol=0, atol=1e-5), name
    groups.mpu = None  # the pipeline's, for whatever comes next


#: The parameters of a pipeline of two stages.
PIPELINE = ("tied_modules.ends.weight", "1.weight", "1.bias", "3.weight", "3.bias")
UNMANAGED = {"managed_gradient_accumulation": False}
AUTOCAST = {
    "torch_autocast": {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": ["tests.models.Cell"],
    }
}
HPZ = {**Z3, "zero_hpz_partition_size": 2}
OFFLOAD_PARAM = {**Z3, **CPU, "offload_param": {"device": "cpu"}}
CASES: dict[str, Callable[[Path], None]] = {
    **EXPECTATIONS,
    "z1_fp16": partial(run, Case({"stage": 1}, "fp16", overflow_at=1)),
    "micro_z1_fp16": partial(run, Case({"stage": 1}, "fp16", "instance", method="micro")),
    "z1_offload": partial(run, Case({"stage": 1, **CPU}, "bf16")),
    "micro_z1_offload": partial(run, Case({"stage": 1, **CPU}, "bf16", "instance", method="micro")),
    "z1_unmanaged": partial(run, Case({"stage": 1}, "bf16", extra=UNMANAGED), by=in_halves),
    "z2_unmanaged": partial(run, Case(Z2, "bf16", extra=UNMANAGED), by=in_halves),
    "z3_unmanaged": partial(run, Case(Z3, "bf16", extra=UNMANAGED), by=in_halves),
    "z1_reduced_once": partial(run, Case({"stage": 1}, "bf16"), by=reduced_once),
    "z3_reduced_once": partial(run, Case(Z3, "bf16"), by=reduced_once),
    "z3_hpz": partial(run, Case(HPZ, "bf16", "instance")),
    "z3_offload_param": partial(run, Case(OFFLOAD_PARAM, "bf16")),
    "micro_z3_offload_param": partial(run, Case(OFFLOAD_PARAM, "bf16", "instance", method="micro")),
    "compiled": compiled,
    "frozen_later": frozen_later,
    "tied_pipeline": tied_pipeline,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    # DeepSpeed remembers that there was autocast, so these come last.
    "z2_autocast": partial(run, Case(Z2, extra=AUTOCAST)),
    "z3_autocast": partial(run, Case(Z3, how="instance", extra=AUTOCAST)),
}
