# SPDX-License-Identifier: Apache-2.0
"""The memory estimator against bytes that are really there.

``CASES`` are run by ``tests.world`` on two and three ranks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.__main__ import main
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.quantized import QuantizedMoment
from adapprox_ds.adapprox.state import new_state
from adapprox_ds.core.layout import ParamFragment, ShardLayout
from adapprox_ds.report.estimate import crossover, estimate
from adapprox_ds.report.model_shapes import MODELS, load_shapes
from adapprox_ds.report.state_bytes import FIRST_MOMENTS
from tests import ROOT
from tests.models import SHAPES
from tests.world import run_world

Shapes = dict[str, tuple[int, ...]]

MIXED: Shapes = {
    **{name: shape for name, shape in SHAPES.items() if name != "empty"},
    "twin": SHAPES["w1"],
    "scalar": (),
    "wide": (3, 500),
    "tall": (701, 4),
}


def models() -> dict[str, nn.Module]:
    return {
        "mlp": nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50), nn.Linear(50, 7)),
        "conv": nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 5)),
        "rnn": nn.LSTM(20, 33, num_layers=2),
    }


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def zero_fragments(shapes: Shapes, stage: int, world: int, rank: int) -> tuple[list[Any], int]:
    """A rank's fragments and the length of its shard, element by element."""
    if stage == 3:
        fragments, offset = [], 0
        for name, shape in shapes.items():
            slot = math.ceil(math.prod(shape) / world)
            mine = list(range(math.prod(shape)))[rank * slot : (rank + 1) * slot]
            if mine:
                fragments.append(ParamFragment(name, shape, mine[0], len(mine), offset))
            offset += slot
        return fragments, offset
    owners = [(name, i) for name, shape in shapes.items() for i in range(math.prod(shape))]
    while len(owners) % (2 * world):
        owners.append(("", 0))
    size = len(owners) // world
    mine = owners[rank * size : (rank + 1) * size]
    fragments = []
    for name, shape in shapes.items():
        if found := [(at, i) for at, (owner, i) in enumerate(mine) if owner == name]:
            fragments.append(ParamFragment(name, shape, found[0][1], len(found), found[0][0]))
    return fragments, size


def real_bytes(flat: torch.Tensor, layout: ShardLayout, h: Hyperparameters) -> tuple[int, int]:
    """Bytes of the first and of the second moment of a state that is allocated."""
    state = new_state(flat, layout, h)
    store = state["exp_avg_sq"].store
    tensors = [store.dense, *(t for b in store.factors for t in (b.q, b.u))]
    held = state.get("exp_avg")
    if isinstance(held, QuantizedMoment):
        first = sum(t.untyped_storage().nbytes() for t in (held.store.codes, held.store.scales))
    else:
        first = 0 if held is None else held.untyped_storage().nbytes()
    return first, sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("rank", [1, 5, 400])
@pytest.mark.parametrize("kind", FIRST_MOMENTS)
@pytest.mark.parametrize("name", models())
def test_plain_models(name: str, kind: str, rank: int) -> None:
    """Stage 0 to the byte."""
    model = models()[name]
    beta1 = 0.0 if kind == "none" else 0.9
    optimizer = Adapprox(
        model.named_parameters(), betas=(beta1, 0.999), rank_max=rank, first_moment=kind
    )
    optimizer.init_state()
    held = estimate(shapes_of(model), stage=0, world=3, ranks=[rank], first_moment=kind)
    metrics = optimizer.metrics()
    assert held.adapprox[rank].state == (metrics.state_bytes,) * 3
    assert held.peers[0].largest == metrics.adamw_state_bytes
    assert held.adapprox[rank].mean_rank == metrics.mean_rank


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_plain_models_in_bf16(cls: Any, rounding: str) -> None:
    """Stage 0 to the byte: state, weights and gradients."""
    model = models()["mlp"].bfloat16()
    knobs = {} if cls is MicroAdam else {"first_moment": "int4", "rank_max": 5}
    optimizer = cls(model.named_parameters(), weight_rounding=rounding, **knobs)
    optimizer.init_state()
    masters = "compensated" if rounding == "compensated" else "bf16"
    shapes = shapes_of(model)
    held = estimate(shapes, stage=0, world=1, ranks=[5], masters=masters, first_moment="int4")
    ours = held.micro_adam if cls is MicroAdam else held.adapprox[5]
    metrics = optimizer.metrics()
    assert ours.largest == metrics.state_bytes
    assert held.peers[0].largest == metrics.adamw_state_bytes
    weights = sum(p.nbytes for p in model.parameters())
    assert held.total(ours) == 2 * weights + metrics.state_bytes


def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """The largest model that fits, with its bytes; the next one does not."""
    assert main(["estimate", "--fit", "80GiB", "--world", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("bf16 masters, Adapprox int4"))
    cells = re.findall(r"(\S+) \(([\d.]+) GiB\)", row)
    assert [name for name, _ in cells] == ["llama-3-8b"] * 3 + ["llama-3-70b"]
    for stage, (name, size) in enumerate(cells):
        for model in ("llama-3-8b", "llama-3-70b"):
            held = estimate(
                load_shapes(model), stage=stage, world=8, masters="bf16", first_moment="int4"
            )
            total = held.total(held.adapprox[8])
            fits = model == "llama-3-8b" or name == "llama-3-70b"
            assert (total <= 80 * 2**30) == fits
            if model == name:
                assert float(size) == round(total / 2**30, 1)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_simulated_shards(stage: int, world: int) -> None:
    """Each rank's to the byte; shards of padding alone among them."""
    vectors = {n: s for n, s in MIXED.items() if len(s) < 2}
    groups = [{n: s for n, s in MIXED.items() if n not in vectors}, vectors]
    ranks = (1, 4, 50, 51)
    kinds = (("fp32", "fp32"), ("int8", "bf16"), ("bf16", "bf16"), ("int4", "fp32"))
    for k, (kind, kept_in) in zip(ranks, kinds, strict=True):
        knobs = {"first_moment": kind, "factor_dtype": kept_in}
        held = estimate(groups, stage=stage, world=world, ranks=ranks, **knobs)
        h = Hyperparameters(rank_max=k, **knobs)
        first, second = [0] * world, [0] * world
        for rank in range(world):
            for group in groups:
                fragments, numel = zero_fragments(group, stage, world, rank)
                layout = ShardLayout.build(fragments, numel)
                m, v = real_bytes(torch.zeros(numel), layout, h)
                first[rank] += m
                second[rank] += v
        assert held.adapprox[k].second == tuple(second)
        assert held.adapprox[k].first == tuple(first)
        assert held.adapprox[k].mean == pytest.approx(sum(first + second) / world)


def test_table_8() -> None:
    """GPT-2's are those that examples/paper/table8_memory.py counts."""
    result = json.loads((ROOT / "examples/paper/results/table8_memory.json").read_text())
    for ours, theirs in {"gpt2-124m": "GPT-2 124M", "gpt2-345m": "GPT-2 345M"}.items():
        held = estimate(load_shapes(ours), stage=0, world=1, ranks=result["ranks"])
        counted = [o.largest for o in (*held.adapprox.values(), held.peers[0])]
        assert counted == result["models"][theirs]["bytes"]


@pytest.mark.parametrize("name", models())
def test_peers(name: str) -> None:
    """Beside the states of torch's own, without their step counters."""
    model = models()[name]
    adamw, adafactor, eight = estimate(shapes_of(model), stage=0, world=1).peers
    for peer, kind in ((adamw, torch.optim.AdamW), (adafactor, torch.optim.Adafactor)):
        optimizer = kind(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
        assert peer.largest == sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
    assert eight.largest <= adamw.largest


def test_eight_bits() -> None:
    """One byte an element, 4 a block of 256, a table of 1 KiB a tensor; small ones in fp32."""
    eight = estimate({"w": (64, 128), "b": (100,)}, stage=0, world=1).peers[2]
    assert eight.first == eight.second == ((8192 + 4 * 32 + 1024) + 400,)


def test_many_ranks() -> None:
    """1024 ranks of Llama 3 8B."""
    shapes = load_shapes("llama-3-8b")
    total = sum(math.prod(s) for s in shapes.values())
    world = 1024
    for stage in (2, 3):
        held = estimate(shapes, stage=stage, world=world, ranks=(16,))
        ours, adamw = held.adapprox[16], held.peers[0]
        assert len(ours.second) == world
        assert held.numel == total
        assert 4 * total <= sum(adamw.first) < 4 * (total + 2 * world * len(shapes))
        assert ours.first == adamw.first
        assert 0 < min(ours.second) <= max(ours.second) < adamw.first[0]
        assert ours.mean * world == sum(ours.first) + sum(ours.second)
        assert ours.largest == ours.first[0] + max(ours.second)


def test_crossover() -> None:
    """At the doublings themselves, from estimates of each; stage 0 has none."""
    shapes = load_shapes("gpt2-124m")
    assert crossover(shapes, stage=0, rank=8) is None
    for stage in (1, 3):
        found = crossover(shapes, stage=stage, rank=16)
        assert found is not None
        assert found.half is not None
        assert found.nothing is not None
        for share, world in ((2, found.half), (1, found.nothing)):
            for n, pays in ((world // 2, True), (world, False)):
                held = estimate(shapes, stage=stage, world=n, ranks=(16,))
                saves = share * max(held.adapprox[16].second) < held.peers[0].first[0]
                assert saves == pays


@pytest.mark.parametrize("name", MODELS)
def test_built_in_shapes(name: str) -> None:
    """Names, shapes and order are those of transformers."""
    transformers = pytest.importorskip("transformers")
    llama = {"vocab_size": 128256, "num_key_value_heads": 8}
    small = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    kind, settings = {
        "gpt2-124m": ("GPT2", {}),
        "gpt2-345m": ("GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
        "bert-base": ("Bert", {}),
        "llama-3-8b": ("Llama", {**llama, **small, "num_attention_heads": 32}),
        "llama-3-70b": ("Llama", {**llama, **large, "num_attention_heads": 64}),
    }[name]
    head = {"GPT2": "LMHeadModel", "Bert": "ForMaskedLM", "Llama": "ForCausalLM"}[kind]
    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(**settings)
        model = getattr(transformers, kind + head)(config)
    assert list(load_shapes(name).items()) == list(shapes_of(model).items())


def save_config(folder: Path, **keys: Any) -> Path:
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    path = folder / "config.json"
    path.write_text(json.dumps({**config, **keys}))
    return path


def test_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder, its file, and a config that names no class."""
    pytest.importorskip("transformers")
    path = save_config(tmp_path, architectures=["GPT2LMHeadModel"])
    shapes = load_shapes(str(path))
    assert load_shapes(str(tmp_path)) == shapes
    assert shapes["transformer.wte.weight"] == (50, 24)
    save_config(tmp_path)
    assert load_shapes(str(path))["wte.weight"] == (50, 24)
    options = ["--stage", "2", "--world", "4", "--ranks", "1", "4", "--two-groups"]
    assert main(["estimate", "--model", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "gradients", "master", "k = 4", "AdamW8bit", "Adafactor"):
        assert word in printed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--stage": "4"}, ("stage=4", "0, 1, 2 or 3")),
        ({"--stage": "two"}, ("--stage", "two")),
        ({"--world": "0"}, ("world=0", "from 1 to")),
        ({"--world": "9999999"}, ("world=9999999", "1048576")),
        ({"--rank-max": "0"}, ("ranks=0", ">= 1")),
        ({"--ranks": "-3"}, ("ranks=-3", ">= 1")),
        ({"--dtype": "fp8"}, ("dtype='fp8'", "bf16, fp16, fp32")),
        ({"--first-moment": "fp4"}, ("first_moment='fp4'", "fp32, bf16, int8, int4, none")),
        ({"--masters": "fp8"}, ("masters='fp8'", "fp32, bf16, compensated")),
        ({"--masters": "bf16", "--dtype": "fp32"}, ("masters='bf16'", "dtype='fp32'")),
        ({"--fit": "much"}, ("size 'much'", "GiB")),
        ({"--factor-dtype": "fp16"}, ("factor_dtype='fp16'", "fp32, bf16")),
        ({"--model": "gpt5"}, ("model='gpt5'", "gpt2-124m", "config.json")),
        # What is wrong beside the model is said before the model is looked for.
        ({"--model": "gpt5", "--world": "0"}, ("world=0",)),
    ],
    ids=str,
)
def test_refused(
    changed: dict[str, str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; the last line names the key, the value and what is allowed."""
    options = {"--model": "gpt2-124m", "--stage": "1", "--world": "2", **changed}
    with pytest.raises(SystemExit) as raised:
        main(["estimate", *(word for pair in options.items() for word in pair)])
    assert raised.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only configs need it, and the error names it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_shapes("gpt2-124m")
    with pytest.raises(ValueError, match="package transformers is not installed"):
        load_shapes(str(save_config(tmp_path)))


def test_broken_config(tmp_path: Path) -> None:
    """One line that names the path."""
    pytest.importorskip("transformers")
    for keys in ({"model_type": "nothing known"}, {"n_embd": "wide"}):
        with pytest.raises(ValueError, match="cannot build it") as raised:
            load_shapes(str(save_config(tmp_path, **keys)))
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_refused_shapes() -> None:
    for shapes, words in (({"w": (2, -1)}, "shapes\\['w'\\]"), ({}, "at least one")):
        with pytest.raises(ValueError, match=words):
            estimate(shapes, stage=1, world=1)


def under_deepspeed(stage: int, precision: str, kind: str, masters_kept: str, folder: Path) -> None:
    """Weights, masters, gradients and state of this rank against the estimate."""
    from tests.models import trainable
    from tests.zero.cases_stages import DECAY, Case, adapprox_of, start, train

    threshold = 200
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = threshold
    beta1 = 0.0 if kind == "none" else 0.9
    knobs = {"rank_min": 3, "rank_max": 3, "betas": (beta1, 0.999), "first_moment": kind}
    if masters_kept != "fp32":
        knobs["weight_rounding"] = "compensated" if masters_kept == "compensated" else "stochastic"
    case = Case(zero if stage else None, precision, knobs=knobs)
    engine, model = start(case)
    train(engine, case, 0)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    trained = [n for n in SHAPES if n != "frozen"]
    held = estimate(
        [{n: SHAPES[n] for n in trained if (n in DECAY) == decays} for decays in (True, False)],
        stage=stage,
        world=world,
        ranks=[3],
        dtype=precision.split("_")[0],
        masters=masters_kept,
        first_moment=kind,
        persistence_threshold=threshold,
    )
    metrics = adapprox_of(engine).metrics()
    assert held.adapprox[3].state[rank] == metrics.state_bytes
    assert held.peers[0].largest == metrics.adamw_state_bytes

    wrapper = engine.optimizer
    parameters = list(trainable(model).values())
    if stage == 0:
        masters = [p for group in wrapper.fp32_groups for p in group]
        weights = parameters
    elif stage == 3:
        weights = [p.ds_tensor for p in parameters]
        masters = wrapper.fp32_partitioned_groups_flat
        assert held.gradients == wrapper.grad_partitions_flat_buffer.nbytes
        weights += [p.data for p in parameters if p.ds_numel <= threshold]
    else:
        masters, weights = wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups_flat
    assert held.parameters == sum(t.nbytes for t in weights)
    storages = {t.untyped_storage().data_ptr() for t in weights}
    apart = [t for t in masters if t.untyped_storage().data_ptr() not in storages]
    assert held.master == sum(t.nbytes for t in apart)
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    f"z{stage}_{precision}_{kind}_{masters}": partial(
        under_deepspeed, stage, precision, kind, masters
    )
    for stage, precision, kind, masters in (
        (0, "bf16", "fp32", "fp32"),
        (0, "bf16", "int8", "fp32"),
        (1, "bf16", "int8", "fp32"),
        (1, "fp32", "none", "fp32"),
        (1, "bf16_masters", "int4", "bf16"),
        (2, "bf16", "none", "fp32"),
        (2, "fp32", "bf16", "fp32"),
        (2, "bf16_masters", "int4", "compensated"),
        (3, "bf16", "fp32", "fp32"),
        (3, "fp32", "int8", "fp32"),
        (3, "bf16_masters", "int8", "compensated"),
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    pytest.importorskip("deepspeed")
    return {
        world: run_world(
            world,
            "tests.report.test_estimate",
            list(CASES),
            tmp_path_factory.mktemp(f"world{world}"),
        )
        for world in (2, 3)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_deepspeed(outcomes: dict[int, dict[str, str]], world: int, case: str) -> None:
    """Every rank's bytes, exactly."""
    assert not outcomes[world][case], outcomes[world][case]
