# SPDX-License-Identifier: Apache-2.0
"""Our optimizers in DeepSpeed: by the JSON's "optimizer", as instances, or attached afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.micro_adam.optimizer import MicroAdam
from adapprox_ds.zero import configuration, discover, handshake
from adapprox_ds.zero.compat import config_of, warn_untested
from adapprox_ds.zero.norms import norm_of_wrapper

#: By the name in a DeepSpeed config, in lower case.
OPTIMIZERS: Mapping[str, type[Adapprox] | type[MicroAdam]] = {
    cls.__name__.lower(): cls for cls in (Adapprox, MicroAdam)
}


#: DeepSpeed's name of the group of all parameters but experts (moe/utils.py).
_DENSE = "dense-params"


def register() -> None:
    """Let ``"optimizer": {"type": "Adapprox"}`` work with the stock ``deepspeed.initialize``.

    And ``"MicroAdam"``. DeepSpeed looks optimizer names up in ``torch.optim`` (runtime/engine.py,
    ``_configure_basic_optimizer``), so the classes are put there. For scripts whose call of
    ``deepspeed.initialize`` is out of reach, as in the Hugging Face Trainer. The config needs
    ``"zero_allow_untested_optimizer": true`` then.
    """
    for cls in OPTIMIZERS.values():
        setattr(torch.optim, cls.__name__, cls)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a config that names Adapprox or MicroAdam; same result.

    Builds the optimizer from the JSON's ``"optimizer"`` block (or takes the instance or callable
    given, of these or MatrixViews), passes it on as client optimizer, reads its layout off the
    engine and verifies it. A config that names another optimizer is passed to DeepSpeed as it is.
    Ranks compare their settings and models, before the engine is built and after it.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler) of ``deepspeed.initialize``.

    Raises:
        ValueError, TypeError: a parameter or combination that is not supported; names the key,
            the value and the remedy, before anything is built.
        RuntimeError: see :func:`attach`; or ranks were started with different settings, models or
            releases of this package: on all of them, names the ranks and what differs.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.pipe import PipelineModule

    args, settings = configuration.load(args, config, config_params)
    block = settings.get("optimizer") or {}
    named = OPTIMIZERS.get(str(block.get("type", "")).lower())
    # What a callable builds is not known yet.
    owner = type(optimizer).__name__ if hasattr(optimizer, "param_groups") else "the optimizer"
    if optimizer is None and named is not None:
        owner = named.__name__
        optimizer = _builder(named, block.get("params", {}), model)
    else:
        named = None
    ours = optimizer is not None
    extra = {} if distributed_port is None else {"distributed_port": distributed_port}
    if isinstance(model_parameters, Iterator):
        model_parameters = list(model_parameters)
    if ours:
        configuration.refuse(settings, owner)
        settings = configuration.complete(settings)
        deepspeed.init_distributed(
            get_accelerator().communication_backend_name(),
            dist_init_required=dist_init_required,
            **extra,
        )
        _take_device(args)
        # Where ranks may have different models, those are compared once their groups are known.
        parallel = isinstance(model, PipelineModule) or mpu or settings.get("tensor_parallel")
        groups = getattr(optimizer, "param_groups", model_parameters) or ()
        start = handshake.facts_of_start(
            None if parallel else model, block.get("params", {}), groups
        )
        handshake.require_alike(start, None, owner)
    result = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings,
        mesh_param=mesh_param,
        **extra,
    )
    engine, wrapper = result[0], result[0].optimizer
    if ours:
        attached = _ours_in(wrapper)
        if named is not None:
            engine.client_optimizer = attached  # whose class optimizer_name() tells
        _adopt(wrapper, attached, engine.data_parallel_group)
        _follow(engine, attached)
        if not isinstance(attached, MatrixViews):
            configuration.refuse_universal_load(engine, attached)
    return result


def _take_device(args: Any) -> None:
    """Make this rank's accelerator the current one, as the engine's constructor will.

    Until then it is the first of the host, and collectives of ranks that share a GPU fail.
    """
    from deepspeed.accelerator import get_accelerator

    number = int(getattr(args, "device_rank", os.environ.get("LOCAL_RANK", -1)))
    if number >= 0 and get_accelerator().is_available():
        get_accelerator().set_device(number)


def attach(engine: Any) -> Adapprox | MicroAdam | MatrixViews:
    """Read the layout of every shard off a DeepSpeed engine; what ``initialize`` ends with.

    Call it after a stock ``deepspeed.initialize``; a second call changes nothing. Frameworks that
    make that call themselves may put another optimizer in its place without a word, so call it
    there too, before the first step.

    Args:
        engine: the engine, or accelerate's prepared optimizer, which is what the callbacks of the
            Hugging Face Trainer are given.

    Returns:
        The engine's Adapprox or MicroAdam, for ``metrics()``; or its MatrixViews.

    Raises:
        RuntimeError: the engine's optimizer is none of ours, its wrapper is one that cannot work
            with it, a shard does not hold what DeepSpeed's tables say, or ranks that share a shard
            have different settings or parameters.
        ValueError: the configuration says ``checkpoint.load_universal``, and the optimizer's state
            cannot be made of the dense moments that DeepSpeed's loader brings.
    """
    if isinstance(engine, Adapprox | MicroAdam | MatrixViews):
        raise RuntimeError(
            f"attach was given the {type(engine).__name__} itself: in plain torch there is nothing "
            "to attach; with DeepSpeed give it the engine that deepspeed.initialize returned"
        )
    optimizer = _ours_in(engine.optimizer)
    _adopt(engine.optimizer, optimizer)
    if hasattr(engine, "load_universal_checkpoint"):  # accelerate's optimizer has no engine
        _follow(engine, optimizer)
    return optimizer


def _follow(engine: Any, optimizer: ShardOptimizer | MatrixViews) -> None:
    """What an engine's configuration asks of its optimizer.

    Raises:
        ValueError: what would not work.
    """
    optimizer.shards.lets_through = configuration.lets_through(config_of(engine))
    configuration.refuse_dense_moments(engine, optimizer)


def _ours_in(wrapper: Any) -> Adapprox | MicroAdam | MatrixViews:
    """The optimizer of this package in DeepSpeed's wrapper.

    Raises:
        RuntimeError: there is none.
    """
    own = isinstance(wrapper, Adapprox | MicroAdam | MatrixViews)
    optimizer = wrapper if own else getattr(wrapper, "optimizer", None)
    if not isinstance(optimizer, Adapprox | MicroAdam | MatrixViews):
        found = type(optimizer if optimizer is not None else wrapper).__name__
        raise RuntimeError(
            f"the engine's optimizer is {found}, not Adapprox, MicroAdam or MatrixViews. With CPU "
            "offload accelerate, and so the Hugging Face Trainer, swaps a client optimizer for "
            'DeepSpeedCPUAdam unless the DeepSpeed config says "zero_force_ds_cpu_optimizer": '
            "false; and the Trainer drops optimizers=(...): give it "
            'optimizer_cls_and_kwargs=(Adapprox, {...}), and no "optimizer" in the DeepSpeed config'
        )
    return optimizer


def _adopt(wrapper: Any, optimizer: ShardOptimizer | MatrixViews, ranks: Any = None) -> None:
    """Compare ranks, and read the layouts off DeepSpeed's wrapper, if there is one, once.

    Args:
        wrapper: the engine's optimizer.
        optimizer: itself, or what it wraps.
        ranks: the data-parallel group, for a wrapper that has none; None where they are not all
            known to be here.
    """
    from deepspeed import __version__ as release

    shards = optimizer.shards
    if shards.attached:
        return
    warn_untested(release)
    ranks = getattr(wrapper, "dp_process_group", ranks)
    if ranks is not None:
        handshake.require_alike(handshake.facts_of_shards(shards), ranks, shards.owner)
        shards.process_group = ranks
    if optimizer is not wrapper:
        shards.adopt(discover.from_wrapper(wrapper, shards))
        shards.norm = norm_of_wrapper(wrapper, shards, ranks)
        if ranks is not None:
            shards.agree = partial(handshake.any_rank, group=ranks)
    # Only now: a second call must not pass where the first one failed.
    shards.attached = optimizer is not wrapper or ranks is not None


def _builder(
    cls: type[Adapprox] | type[MicroAdam],
    params: Mapping[str, Any],
    model: torch.nn.Module | None,
) -> Callable[[Sequence[Any]], ShardOptimizer]:
    """A client-optimizer callable; the arguments are checked now, before the engine is built."""
    probe = torch.empty(0, dtype=torch.float32, device="cpu")
    cls([torch.nn.Parameter(probe)], **params)

    def build(model_parameters: Sequence[Any]) -> ShardOptimizer:
        # The model's own names: DeepSpeed's are emptied whenever an engine is collected.
        names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        optimizer = cls(_experts_apart(_named(model_parameters, names)), **params)
        for i, given in enumerate(model_parameters):
            if isinstance(given, dict):  # it stays the group, as torch.optim keeps it
                given.update(optimizer.param_groups[i])
                optimizer.param_groups[i] = given
        return optimizer

    return build


def _named(params: Sequence[Any], names: Mapping[int, str]) -> list[Any]:
    """Parameters or groups with the model's names, which seed the sketches."""
    if not params or not isinstance(params[0], dict):
        return _name_all(params, names, "group0")
    return [
        {**group, "params": _members(group["params"])}
        if "param_names" in group
        else {**group, "params": _name_all(group["params"], names, f"group{i}")}
        for i, group in enumerate(params)
    ]


def _members(tensors: Any) -> list[Any]:
    """Of a parameter group: it may hold one tensor."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _name_all(tensors: Any, names: Mapping[int, str], place: str) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs; ``tensors`` is a tensor, tensors, or such pairs already."""
    tensors = _members(tensors)
    if tensors and isinstance(tensors[0], tuple):
        return tensors
    return [(names.get(id(p), f"{place}.{i}"), p) for i, p in enumerate(tensors)]


def _experts_apart(params: list[Any]) -> list[Any]:
    """What :func:`_named` gives; the experts of mixtures are moved to groups of their own.

    DeepSpeed needs such groups, and makes them for optimizers that it builds itself alone
    (runtime/engine.py, ``_configure_optimizer``). They come last, with the settings of the groups
    that the experts are from.
    """
    from deepspeed.moe.utils import configure_moe_param_groups, is_moe_param, is_moe_param_group

    grouped = bool(params) and isinstance(params[0], dict)
    groups: list[dict[str, Any]] = params if grouped else [{"params": params, "name": _DENSE}]
    names: dict[int, str] = {}
    bare = []
    for i, group in enumerate(groups):
        pairs = group["params"]
        if "param_names" in group:
            pairs = list(zip(group["param_names"], pairs, strict=True))
        names.update((id(p), name) for name, p in pairs)
        # DeepSpeed tells groups apart by their names, which users need not give.
        bare.append({**group, "name": i, "params": [p for _, p in pairs]})
        bare[-1].pop("param_names", None)
    members = [p for group in bare for p in group["params"]]
    if any(map(is_moe_param_group, bare)) or not any(map(is_moe_param, members)):
        return params
    split = configure_moe_param_groups(bare)
    dense, experts = split[: len(groups)], split[len(groups) :]
    for group, given in zip(dense, groups, strict=True):
        group.pop("name")
        group.update({key: given[key] for key in ("name",) if key in given})
    # DeepSpeed's order is that of a set of strings, which need not be the same on all ranks.
    experts.sort(key=lambda group: str(group["name"]))
    return [
        {**group, "params": [(names[id(p)], p) for p in group["params"]]}
        for group in (*dense, *experts)
    ]
