# SPDX-License-Identifier: Apache-2.0
"""Loads a DeepSpeed configuration, refuses settings that do not work with us, and completes it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.zero.compat import load_config, offsets_of_group

#: The reason of several refusals (DeepSpeed 0.19.8, runtime/base_optimizer.py, lines 508 to 521).
_CPU_ADAM = "DeepSpeed asserts its own DeepSpeedCPUAdam then (runtime/base_optimizer.py)"


def load(args: Any, config: Any, config_params: Any) -> tuple[Any, dict[str, Any]]:
    """Load the configuration from the one argument of ``initialize`` that has it.

    Args:
        args: the script's arguments, which can have the attribute ``deepspeed_config``, a path.
        config: a dict, a path or a base64 string.
        config_params: the old name of ``config``.

    Returns:
        ``args`` without the configuration, and the configuration as a new dict.

    Raises:
        ValueError: none of the arguments has a configuration, or more than one has.
    """
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(
            f"adapprox_ds.initialize needs one DeepSpeed config; got {sorted(named) or 'none'}; "
            f"allowed: exactly one of {sorted(given)}"
        )
    if getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None
    return args, copy.deepcopy(load_config(next(iter(named.values()))))


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("zero_optimization") or {}


def _bf16(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("bf16") or config.get("bfloat16") or {}


def _offload(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return _zero(config).get("offload_optimizer") or {}


def _offloads(config: Mapping[str, Any]) -> bool:
    return _offload(config).get("device", "none") != "none" or bool(
        _zero(config).get("cpu_offload")
    )


def refuse(config: Mapping[str, Any], owner: str) -> None:
    """Raise for settings with which our optimizers would fail, be replaced or lose their state.

    Args:
        config: the DeepSpeed configuration.
        owner: the optimizer's name.

    Raises:
        ValueError: there is such a setting; the message has the key, its value and the remedy.
    """
    zero, offload = _zero(config), _offload(config)
    stage = zero.get("stage", 0)
    clipping = config.get("gradient_clipping", 1.0)
    autocast = config.get("torch_autocast") or {}
    half = str(autocast.get("dtype", "")) in ("fp16", "float16", "torch.float16")
    universal = bool((config.get("checkpoint") or {}).get("load_universal"))
    bf16 = _bf16(config)
    masters = bool(bf16.get("bf16_master_weights_and_grads"))
    problems = [
        (
            masters and _offloads(config),
            "bf16.bf16_master_weights_and_grads=true with zero_optimization.offload_optimizer",
            f"{_CPU_ADAM}; leave one of the two out",
        ),
        (
            masters and not bf16.get("bf16_optimizer_states"),
            "bf16.bf16_master_weights_and_grads=true without bf16.bf16_optimizer_states=true",
            f"{_CPU_ADAM}; set both to true, or neither",
        ),
        (
            bool((config.get("fp16") or {}).get("fp16_master_weights_and_grads")),
            "fp16.fp16_master_weights_and_grads=true",
            f"{_CPU_ADAM}; leave it out",
        ),
        (
            offload.get("device") == "nvme",
            'zero_optimization.offload_optimizer.device="nvme"',
            'DeepSpeed drops a client optimizer\'s state on resume; use "cpu", the state is small',
        ),
        (
            offload.get("ratio", 1.0) < 1.0,
            f"zero_optimization.offload_optimizer.ratio={offload.get('ratio')}",
            "a partial offload runs DeepSpeedCPUAdam; use 1.0 or leave it out",
        ),
        (
            bool(offload.get("super_offload")),
            "zero_optimization.offload_optimizer.super_offload=true",
            "it runs an Adam of its own; leave it out",
        ),
        (
            zero.get("zenflow") is not None,
            "zero_optimization.zenflow",
            "it runs an Adam of its own; leave it out",
        ),
        (
            bool(zero.get("elastic_checkpoint")),
            "zero_optimization.elastic_checkpoint=true",
            "DeepSpeed cannot repartition a client optimizer's state; use false",
        ),
        (
            bool(config.get("sparse_gradients")),
            "sparse_gradients=true",
            f"{owner} needs dense gradients; use false and sparse=False embeddings",
        ),
        (
            _offloads(config) and config.get("zero_force_ds_cpu_optimizer") is True,
            "zero_force_ds_cpu_optimizer=true",
            f"it replaces {owner} by DeepSpeedCPUAdam; use false",
        ),
        (
            bool(autocast.get("enabled")) and half and clipping != 0,
            f'torch_autocast.dtype="fp16" with gradient_clipping={clipping}',
            'DeepSpeed clips before it unscales; use gradient_clipping 0, or dtype "bf16"',
        ),
        (
            universal and bool(zero.get("round_robin_gradients")),
            "zero_optimization.round_robin_gradients=true with checkpoint.load_universal=true",
            "DeepSpeed converts such checkpoints with misplaced slices; use false",
        ),
    ]
    for present, key, remedy in problems:
        if present:
            raise ValueError(f"{owner}: {key} is not supported: {remedy}")
    fp16 = config.get("fp16") or {}
    if stage == 0 and fp16.get("enabled") and fp16.get("loss_scale", 0) != 1:
        warnings.warn(
            "fp16 at ZeRO stage 0: DeepSpeed divides gradients by a loss scale that it never "
            "multiplied the loss with, so that eps may outweigh them; use stage 1, or "
            '"fp16": {"loss_scale": 1}',
            stacklevel=3,
        )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the flags added that DeepSpeed needs for an optimizer of the user's."""
    completed = dict(config)
    if _zero(config).get("stage", 0) >= 1:
        completed.setdefault("zero_allow_untested_optimizer", True)
    if _offloads(config):
        completed.setdefault("zero_force_ds_cpu_optimizer", False)
    return completed


def refuse_dense_moments(engine: Any, optimizer: ShardOptimizer | MatrixViews) -> None:
    """Raise if DeepSpeed would load a universal checkpoint as dense moments that cannot be used.

    Args:
        engine: the engine; nothing is checked unless its configuration sets
            ``checkpoint.load_universal``.
        optimizer: the optimizer of this package that it uses.

    Raises:
        ValueError: the optimizer's state cannot be computed from the dense moments that each
            process gets.
    """
    if not engine.load_universal_checkpoint():
        return
    owner = type(optimizer).__name__
    if not optimizer.loads_dense_moments:
        raise ValueError(
            f"{owner}: checkpoint.load_universal=true is not supported: DeepSpeed's loader makes "
            "dense moments of Adam; leave it out and call adapprox_ds.load_universal(engine, "
            "folder)"
        )
    together = any(group.get("scope") == "matrix" for group in optimizer.param_groups)
    if together and engine.zero_optimization_stage() and engine.seq_dp_world_size > 1:
        raise ValueError(
            f"{owner}: checkpoint.load_universal=true with scope='matrix' is not supported: "
            "DeepSpeed's loader gives each process a dense part of a matrix, which none can factor "
            "alone; leave it out and call adapprox_ds.load_universal(engine, folder)"
        )


def refuse_universal_load(engine: Any, optimizer: ShardOptimizer) -> None:
    """Raise if DeepSpeed's loader of universal checkpoints would load wrong values or crash.

    Args:
        engine: the engine; nothing is checked unless its configuration sets
            ``checkpoint.load_universal``.
        optimizer: the optimizer of this package that it uses.

    Raises:
        ValueError: at stage 3, the groups' hyper-parameters differ, and the loader would give all
            groups those of the first; at stages 1 and 2, a process's shard is padding alone, on
            which the loader fails.
    """
    if not engine.load_universal_checkpoint():
        return
    wrapper, owner = engine.optimizer, type(optimizer).__name__
    if engine.zero_optimization_stage() == 3:
        for name in optimizer.field_names:
            values = [group[name] for group in optimizer.param_groups]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{owner}: checkpoint.load_universal=true at stage 3 gives every parameter "
                    f"group the first one's hyper-parameters, and {name} differs between them: "
                    f"{values}; use one group, or stage 1 or 2"
                )
        return
    for i, flat in enumerate(getattr(wrapper, "single_partition_of_fp32_groups", ())):
        last = offsets_of_group(wrapper, i)[-1]
        end = last + wrapper.round_robin_bit16_groups[i][-1].numel()
        world = wrapper.bit16_groups_flat[i].numel() // flat.numel()
        if end <= (world - 1) * flat.numel():
            raise ValueError(
                f"{owner}: checkpoint.load_universal=true: parameter group {i} of {end} elements "
                f"leaves a rank of {world} with padding only, on which DeepSpeed's loader fails; "
                "merge it with another group"
            )


def allows_nonfinite(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks to train on with gradients of NaN or infinity.

    Only an explicit setting counts, since the default differs between releases of DeepSpeed.
    """
    bf16 = _bf16(config)
    return bool(bf16.get("enabled")) and bf16.get("check_grad_overflow") is False


def refuse_wrapper(wrapper: Any, owner: str) -> None:
    """Raise for wrappers that do not call the optimizer, or do not keep its state.

    Args:
        wrapper: ``engine.optimizer``.
        owner: the name of the optimizer that it wraps.

    Raises:
        RuntimeError: it is such a wrapper; the message has the configuration key to change.
    """
    kind = type(wrapper).__name__
    if kind.startswith(("ZenFlow", "SuperOffload")):
        raise RuntimeError(
            f"{owner}: {kind} runs an Adam of its own, so {owner} would never be called; remove "
            '"zenflow" / "super_offload" from the DeepSpeed config'
        )
    if getattr(wrapper, "swap_optimizer", False):
        raise RuntimeError(
            f'{owner}: offload_optimizer.device="nvme" is not supported: DeepSpeed drops a client '
            'optimizer\'s state on resume; use "cpu", where it takes little memory'
        )
    if getattr(wrapper, "elastic_checkpoint", False):
        raise RuntimeError(
            f"{owner}: elastic_checkpoint=true is not supported: DeepSpeed cannot repartition a "
            "client optimizer's state; set it to false"
        )


def known_sections() -> set[str]:
    """The keys at the top of a DeepSpeed configuration, as far as DeepSpeed lists them."""
    from deepspeed.runtime import constants

    held = vars(constants).items()
    names = {value for name, value in held if name.isupper() and type(value) is str}
    return names | {
        *("zero_optimization", "activation_checkpointing", "flops_profiler", "comms_logger"),
        *("tensorboard", "wandb", "csv_monitor", "comet", "autotuning", "elasticity", "compile"),
        *("compression_training", "data_efficiency", "aio", "zero_force_ds_cpu_optimizer"),
    }
