# SPDX-License-Identifier: Apache-2.0
"""Hides the differences between releases of DeepSpeed, and its private functions.

No other module depends on a release. Each function says which release changed what. ``make compat``
runs a part of the tests with several releases.
"""

from __future__ import annotations

import base64
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

#: The oldest and the newest release of DeepSpeed that the tests were run with.
TESTED = ("0.16.9", "0.19.8")


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers of a release; of "0.19.8+unknown", (0, 19, 8)."""
    return tuple(int(n) for n in re.findall(r"\d+", release.partition("+")[0])[:3])


@cache
def warn_untested(release: str) -> None:
    """Warn if a release of DeepSpeed is outside the tested range; once for each process."""
    oldest, newest = TESTED
    if not _numbers(oldest) <= _numbers(release) <= _numbers(newest):
        warnings.warn(
            f"adapprox_ds was tested with DeepSpeed {oldest} to {newest}, not with {release}; "
            "should anything fail, install one of those",
            stacklevel=4,
        )


def load_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict.

    DeepSpeed has a function for this since 0.18.6 (runtime/tensor_parallel/init_utils.py,
    load_ds_config); before that, the constructor of DeepSpeedConfig did it.

    Args:
        config: a dict, the path of a JSON file, or a base64 string of JSON.

    Raises:
        ValueError: it is none of these.
    """
    import hjson  # type: ignore[import-untyped]
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    if isinstance(config, dict):
        return config
    problem = (
        "Expected a string path to an existing deepspeed config, or a dictionary or a valid "
        f"base64. Received: {config}"
    )
    if not isinstance(config, str):
        raise ValueError(problem)
    if os.path.exists(config):
        text = Path(config).read_text("utf-8")
        return hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    try:
        return hjson.loads(base64.urlsafe_b64decode(config).decode("utf-8"))
    except (UnicodeDecodeError, AttributeError, ValueError) as error:
        raise ValueError(problem) from error


def config_of(engine: Any) -> dict[str, Any]:
    """The configuration that an engine was given, without DeepSpeed's defaults."""
    config: dict[str, Any] = engine._config._param_dict
    return config


def offsets_of_group(wrapper: Any, group: int) -> list[int]:
    """The offset of each parameter of a group of ZeRO-1/2 in the group's flat tensor.

    Since 0.19.7 DeepSpeed may pad between parameters, and records the offsets
    (``round_robin_bit16_offsets``). Before that, parameters lie end to end in the order of
    ``round_robin_bit16_groups``.
    """
    if hasattr(wrapper, "round_robin_bit16_offsets"):
        return list(wrapper.round_robin_bit16_offsets[group])
    sizes = [p.numel() for p in wrapper.round_robin_bit16_groups[group]]
    return list(accumulate(sizes, initial=0))[:-1]


def checkpoint_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of the optimizer state and those of the model state in a checkpoint's folder.

    Raises:
        FileNotFoundError: there are none.
    """
    from deepspeed.checkpoint import ds_to_universal as stock

    optimizer = [Path(f) for f in stock._get_optim_files(str(folder))]
    return optimizer, [Path(f) for f in stock._get_model_state_files(str(folder))]


def zero_rank(path: Path) -> int | None:
    """The data-parallel rank in the name of a file of ZeRO; None if the name is of another form.

    DeepSpeed 0.19 has functions for this (_filter_zero3_optim_files, _zero3_rank_from_file in
    checkpoint/ds_to_universal.py). The form of the names is the same in all releases.
    """
    match = re.match(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_", path.name)
    return int(match[1]) if match else None


def map_in_processes(work: Callable[[str], None], items: Sequence[str], workers: int) -> None:
    """Call ``work`` with each item, in that many worker processes; with 1, in this process."""
    from deepspeed.checkpoint.ds_to_universal import _do_parallel_work

    _do_parallel_work(work, items, workers)
