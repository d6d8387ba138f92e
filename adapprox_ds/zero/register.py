# SPDX-License-Identifier: Apache-2.0
"""The three ways to use our optimizers with DeepSpeed.

:func:`initialize` replaces ``deepspeed.initialize``. :func:`attach` comes after DeepSpeed's own
``initialize``. :func:`register` lets a DeepSpeed configuration name Adapprox and MicroAdam.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.micro_adam.optimizer import MicroAdam
from adapprox_ds.zero import configuration, discover, handshake
from adapprox_ds.zero.compat import config_of, warn_untested

#: The optimizers by their names in a DeepSpeed configuration, in lower case.
OPTIMIZERS: Mapping[str, type[Adapprox] | type[MicroAdam]] = {
    cls.__name__.lower(): cls for cls in (Adapprox, MicroAdam)
}


#: DeepSpeed's name of the group of all parameters but experts (moe/utils.py).
_DENSE = "dense-params"


def register() -> None:
    """Let ``"optimizer": {"type": "Adapprox"}`` or "MicroAdam" work with ``deepspeed.initialize``.

    This is for scripts that cannot change the call of ``deepspeed.initialize``, as with the Hugging
    Face Trainer. DeepSpeed looks optimizer names up in ``torch.optim`` (runtime/engine.py,
    ``_configure_basic_optimizer``), so the classes are added there. The configuration also needs
    ``"zero_allow_untested_optimizer": true``.
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
    """``deepspeed.initialize`` for Adapprox, MicroAdam and MatrixViews; takes the same arguments.

    The optimizer is built from the ``"optimizer"`` block of the configuration, or is the instance
    or callable that is given. Then the layout of its shards is read from the engine and verified.
    A configuration that names another optimizer is passed to DeepSpeed unchanged. The processes
    compare their settings and models, before the engine is built and after.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler), as of ``deepspeed.initialize``.

    Raises:
        ValueError, TypeError: a setting or a combination of settings is not supported. The message
            has the key, the value and the remedy; nothing was built.
        RuntimeError: see :func:`attach`; or processes were started with different settings, models
            or releases of this package, which is raised on all of them.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.pipe import PipelineModule

    args, settings = configuration.load(args, config, config_params)
    block = settings.get("optimizer") or {}
    named = OPTIMIZERS.get(str(block.get("type", "")).lower())
    # A callable's optimizer is not built yet, so its name is not known.
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
        # Where processes may have different models, the models are not compared here but in
        # _adopt, for each group of processes with the same model.
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
            engine.client_optimizer = attached  # so that optimizer_name() returns its name
        _adopt(wrapper, attached, engine.data_parallel_group)
        _apply_configuration(engine, attached)
        if not isinstance(attached, MatrixViews):
            configuration.refuse_universal_load(engine, attached)
    return result


def _take_device(args: Any) -> None:
    """Make this process's accelerator the current one, as the engine's constructor does later.

    The first comparison of the processes comes before that. Without this call they would all use
    the first accelerator of their host, and its collectives would fail.
    """
    from deepspeed.accelerator import get_accelerator

    number = int(getattr(args, "device_rank", os.environ.get("LOCAL_RANK", -1)))
    if number >= 0 and get_accelerator().is_available():
        get_accelerator().set_device(number)


def attach(engine: Any) -> Adapprox | MicroAdam | MatrixViews:
    """Read the layout of every shard from a DeepSpeed engine, and verify it.

    :func:`initialize` does this itself; call it after ``deepspeed.initialize``, before the first
    step. A second call does nothing. Where a framework calls ``deepspeed.initialize``, this also
    finds out whether it replaced the optimizer by another one, as some do without a message.

    Args:
        engine: the engine, or accelerate's prepared optimizer, which the Hugging Face Trainer gives
            to its callbacks.

    Returns:
        The engine's Adapprox, MicroAdam or MatrixViews, for example for ``metrics()``.

    Raises:
        RuntimeError: the engine's optimizer is none of this package, its wrapper cannot work with
            it, a shard does not contain what DeepSpeed's tables say, or processes that share a
            shard have different settings or parameters.
        ValueError: the configuration sets ``checkpoint.load_universal``, and the optimizer's state
            cannot be computed from the dense moments of DeepSpeed's loader.
    """
    if isinstance(engine, Adapprox | MicroAdam | MatrixViews):
        raise RuntimeError(
            f"attach was given the {type(engine).__name__} itself: in plain torch there is nothing "
            "to attach; with DeepSpeed give it the engine that deepspeed.initialize returned"
        )
    optimizer = _ours_in(engine.optimizer)
    _adopt(engine.optimizer, optimizer)
    if hasattr(engine, "load_universal_checkpoint"):  # accelerate's optimizer has no engine
        _apply_configuration(engine, optimizer)
    return optimizer


def _apply_configuration(engine: Any, optimizer: ShardOptimizer | MatrixViews) -> None:
    """Apply the settings of an engine's configuration that concern an attached optimizer.

    Raises:
        ValueError: see :func:`adapprox_ds.zero.configuration.refuse_dense_moments`.
    """
    optimizer.shards.allows_nonfinite = configuration.allows_nonfinite(config_of(engine))
    configuration.refuse_dense_moments(engine, optimizer)


def _ours_in(wrapper: Any) -> Adapprox | MicroAdam | MatrixViews:
    """The optimizer of this package in DeepSpeed's wrapper, or the wrapper if it is one itself.

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


def _adopt(wrapper: Any, optimizer: ShardOptimizer | MatrixViews, group: Any = None) -> None:
    """Compare the processes, and read the layouts from DeepSpeed's wrapper, if there is one.

    This is a collective call, which does nothing where it was made before.

    Args:
        wrapper: the engine's optimizer.
        optimizer: the optimizer that it wraps, or the same one.
        group: the engine's data-parallel process group, which is compared where the wrapper has
            none; None if not all of its processes are known to make this call.
    """
    from deepspeed import __version__ as release

    shards = optimizer.shards
    if shards.attached:
        return
    warn_untested(release)
    group = getattr(wrapper, "dp_process_group", group)
    if group is not None:
        handshake.require_alike(handshake.facts_of_shards(shards), group, shards.owner)
        shards.process_group = group
    if optimizer is not wrapper:
        discover.adopt(wrapper, shards, group)
    # This comes last, so that a second call does not pass where the first one failed.
    shards.attached = optimizer is not wrapper or group is not None


def _builder(
    cls: type[Adapprox] | type[MicroAdam],
    params: Mapping[str, Any],
    model: torch.nn.Module | None,
) -> Callable[[Sequence[Any]], ShardOptimizer]:
    """The callable that ``deepspeed.initialize`` is given to build the optimizer.

    The arguments are checked here already, before the engine is built.

    Args:
        cls: the optimizer's class.
        params: its arguments in the configuration.
        model: the model, whose parameters' names the optimizer uses; None without one.
    """
    probe = torch.empty(0, dtype=torch.float32, device="cpu")
    cls([torch.nn.Parameter(probe)], **params)

    def build(model_parameters: Sequence[Any]) -> ShardOptimizer:
        # These are the model's own names. DeepSpeed clears its names of all parameters when any
        # engine is garbage-collected.
        names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        optimizer = cls(_experts_apart(_named(model_parameters, names)), **params)
        for i, given in enumerate(model_parameters):
            if isinstance(given, dict):  # the user's dict stays the group, as in torch.optim
                given.update(optimizer.param_groups[i])
                optimizer.param_groups[i] = given
        return optimizer

    return build


def _named(params: Sequence[Any], names: Mapping[int, str]) -> list[Any]:
    """Parameters or parameter groups with the model's names, which seed the sketches.

    Args:
        params: parameters or groups as the user gave them.
        names: the model's name of each parameter, by its id.
    """
    if not params or not isinstance(params[0], dict):
        return _name_all(params, names, "group0")
    return [
        {**group, "params": _members(group["params"])}
        if "param_names" in group
        else {**group, "params": _name_all(group["params"], names, f"group{i}")}
        for i, group in enumerate(params)
    ]


def _members(tensors: Any) -> list[Any]:
    """The parameters of a group as a list; a group may have a single tensor instead of several."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _name_all(tensors: Any, names: Mapping[int, str], place: str) -> list[tuple[str, Tensor]]:
    """The pairs (name, parameter) of a group.

    Args:
        tensors: a tensor, several tensors, or such pairs already.
        names: the model's name of each parameter, by its id.
        place: the name of the group, for parameters that the model does not name.
    """
    tensors = _members(tensors)
    if tensors and isinstance(tensors[0], tuple):
        return tensors
    return [(names.get(id(p), f"{place}.{i}"), p) for i, p in enumerate(tensors)]


def _experts_apart(params: list[Any]) -> list[Any]:
    """Move the experts of a mixture of experts to groups of their own.

    DeepSpeed needs such groups, but makes them only for optimizers that it builds itself
    (runtime/engine.py, ``_configure_optimizer``). They come after the other groups, and have the
    settings of the groups that the experts are from.

    Args:
        params: the result of :func:`_named`.
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
        # DeepSpeed distinguishes groups by their names, which users need not give.
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
    # DeepSpeed's order is that of a set of strings, which can differ between processes.
    experts.sort(key=lambda group: str(group["name"]))
    return [
        {**group, "params": [(names[id(p)], p) for p in group["params"]]}
        for group in (*dense, *experts)
    ]
