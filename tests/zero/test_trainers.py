# SPDX-License-Identifier: Apache-2.0
"""Adapprox under the Hugging Face Trainer, accelerate and Lightning, on two ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from adapprox_ds import convert
from adapprox_ds.checkpoint.inspect import inspect
from tests.project.test_pretrain_example import write_corpus
from tests.world import run_world

pytest.importorskip("accelerate")
pytest.importorskip("peft")

FIRST = [
    "trainer_zero2",
    "trainer_zero3",
    "accelerate_zero2",
    "accelerate_offload",
    "swapped_hf_trainer",
    "swapped_accelerate",
    "lora_z2_to_z2",
    "lora_z3_to_z3",
    "lora_z2_to_z3",
    "clipping_default",
    "scheduler_by_rank",
    "block_trainer",
    "block_trainer_json",
    "block_accelerate",
]
RESUMED = ["resume_trainer_zero2", "resume_trainer_zero3", "resume_accelerate_zero2"]
LIGHTNING = importlib.util.find_spec("pytorch_lightning") is not None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def outcomes(scratch: Path) -> dict[str, str]:
    """All runs, and then, in new processes, those that resume some of them."""
    write_corpus(scratch / "text", documents=4, words=300)
    first = [*FIRST, "block_lightning"] if LIGHTNING else FIRST
    return run_world(2, "tests.zero.cases_trainers", first, scratch) | run_world(
        2, "tests.zero.cases_trainers", RESUMED, scratch
    )


@pytest.mark.parametrize("case", [*FIRST, *RESUMED])
def test_case(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_trainers.py."""
    assert not outcomes[case], outcomes[case]


@pytest.mark.skipif(not LIGHTNING, reason="pytorch_lightning is not installed")
def test_lightning_block(outcomes: dict[str, str]) -> None:
    """Of docs/trainers.md, without the strategy's refusal of CPUs."""
    assert not outcomes["block_lightning"], outcomes["block_lightning"]


@pytest.mark.parametrize(
    "folder", ["trainer_zero2/run/checkpoint-6", "accelerate_zero2/run/step-6"]
)
def test_checkpoints_are_deepspeeds(outcomes: dict[str, str], scratch: Path, folder: str) -> None:
    """They can be inspected and converted: factors as factors, by the model's names."""
    converted = scratch / folder / "universal"
    convert(scratch / folder, converted, workers=1)
    for place in (scratch / folder, converted):
        rows = {row.name: row for row in inspect(place).rows}
        assert rows["transformer.h.0.mlp.c_fc.weight"].ranks
        assert not rows["transformer.h.0.mlp.c_fc.bias"].ranks
