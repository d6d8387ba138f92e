# SPDX-License-Identifier: Apache-2.0
"""What differs between releases of DeepSpeed; ``make compat`` runs the other tests with them."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapprox_ds.zero import compat
from tests import ROOT


@pytest.mark.parametrize(
    ("release", "warned"),
    [
        ("0.16.9", 1),
        ("0.18.3", 1),
        ("0.18.4", 0),
        ("0.18.10", 0),
        ("0.19.0+unknown", 0),
        ("0.19.8", 0),
        ("0.19.10", 1),
        ("1.0.0", 1),
    ],
)
def test_warns_once_of_a_release_outside_the_tested_range(
    release: str, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many engines there are."""
    monkeypatch.setattr(compat, "TESTED", ("0.18.4", "0.19.8"))
    compat.warn_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.warn_untested(release)
        compat.warn_untested(release)
    assert len(caught) == warned
    assert all(release in str(w.message) and "0.18.4 to 0.19.8" in str(w.message) for w in caught)


def test_tested_range_is_the_requirement() -> None:
    """setup.py's floor is the oldest tested release; constraints.txt pins the newest."""
    root = ROOT
    assert f'"deepspeed>={compat.TESTED[0]}"' in (root / "setup.py").read_text()
    assert f"deepspeed=={compat.TESTED[1]}\n" in (root / "constraints.txt").read_text()


def test_offsets_are_recorded_ones_or_end_to_end() -> None:
    """Before 0.19.7 no wrapper recorded them."""
    old = SimpleNamespace(round_robin_bit16_groups=[[torch.ones(3), torch.ones(2, 2)]])
    assert compat.offsets_of_group(old, 0) == [0, 3]
    new = SimpleNamespace(**vars(old), round_robin_bit16_offsets=[[0, 4]])
    assert compat.offsets_of_group(new, 0) == [0, 4]


def test_ranks_in_names_of_files() -> None:
    """Files of pipelines and of stage 0 have none."""
    name = "zero_pp_rank_11_mp_rank_00_optim_states.pt"
    assert compat.zero_rank(Path("a") / name) == 11
    assert compat.zero_rank(Path(f"bf16_{name}")) == 11
    assert compat.zero_rank(Path("mp_rank_00_model_states.pt")) is None
    assert compat.zero_rank(Path(f"expp_rank_0_{name}")) is None


def test_configs_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    """A dict, a path or base64; hjson, no key twice."""
    pytest.importorskip("deepspeed")
    config = {"train_batch_size": 4}
    path = tmp_path / "config.json"
    path.write_text('{"train_batch_size": 4,}  # a comment')
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for form in (config, str(path), encoded):
        assert compat.load_config(form) == config
    path.write_text('{"a": 1, "a": 2}')
    for bad in (str(path), str(tmp_path / "absent"), 3):
        with pytest.raises(ValueError):
            compat.load_config(bad)  # type: ignore[arg-type]
