# SPDX-License-Identifier: Apache-2.0
"""A first moment stays what the settings say it is the mean of. Run by test_universal.py.

The sources are those of tests.checkpoint.cases_universal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapprox_ds
from adapprox_ds.checkpoint import load_universal
from adapprox_ds.checkpoint.inspect import inspect
from tests.checkpoint.cases_moving import TAG, record_of, stock_engine
from tests.checkpoint.cases_universal import HALF, NO_DECAY, follow, gather, start, train
from tests.zero.cases_stages import adapprox_of

BETA2, EPS = 0.999, 1e-8


def momenta(engine: Any) -> list[str]:
    return [group["momentum"] for group in adapprox_of(engine).param_groups]


def kind_in(groups: list[str], name: str) -> str:
    return groups[int(name.split(".")[1] in NO_DECAY)]


def converted(saved: Mapping[str, Tensor], old: str, new: str) -> Tensor:
    """The first moment of one parameter as the other kind, in double precision."""
    correction = 1 - BETA2**HALF
    denominator = (saved["v"].double() / correction).sqrt() + EPS
    first = saved["exp_avg"].double()
    if old == new:
        return first
    if old == "update":
        return first * denominator
    # Factors may leave next to nothing of v: held to the most that two such means can give.
    bound = 0.1 * (correction / ((1 - BETA2) * (1 - 0.9**2 / BETA2))) ** 0.5
    return (first / denominator).clamp(-bound, bound)


def require_first_moments(
    engine: Any, record: dict[str, Any], old: list[str], new: list[str]
) -> None:
    """Equal to the bit where the kind stayed, converted where it did not."""
    found = gather(engine)
    for name, saved in record["saved"].items():
        before, after = kind_in(old, name), kind_in(new, name)
        here = found[name]["exp_avg"]
        assert torch.equal(found[name]["fp32"], saved["fp32"])
        if before == after:
            assert torch.equal(here, saved["exp_avg"]), name
        else:
            expected = converted(saved, before, after)
            torch.testing.assert_close(here.double(), expected, rtol=1e-4, atol=1e-9)


def keeps_own(source: str, old: list[str], kind: str, folder: Path) -> None:
    """``load_groups=False``: the run's own momentum stays, and the values follow it."""
    record, run = record_of(source, folder)
    engine, _ = start(kind, empty=True)
    own = momenta(engine)
    assert own != old
    load_universal(engine, run, load_groups=False)
    assert momenta(engine) == own
    require_first_moments(engine, record, old, own)
    train(engine, HALF, HALF + 2)
    engine.destroy()


def takes_over(source: str, old: list[str], kind: str, folder: Path) -> None:
    """The checkpoint's momentum takes the place of the configured one; nothing is converted."""
    record, run = record_of(source, folder)
    engine, _ = start(kind, empty=True)
    assert momenta(engine) != old
    load_universal(engine, run)
    assert momenta(engine) == old
    require_first_moments(engine, record, old, old)
    follow(engine, record)
    engine.destroy()


def stock(source: str, old: list[str], kind: str, configured: list[str], folder: Path) -> None:
    """DeepSpeed's own loader of universal checkpoints: setting and values are those saved."""
    record, run = record_of(source, folder)
    engine, _ = stock_engine(kind, momenta=configured, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(run))
    adapprox_ds.attach(engine)
    adapprox_of(engine).init_state()
    assert momenta(engine) == old
    require_first_moments(engine, record, old, old)
    follow(engine, record)
    engine.destroy()


def inspected(source: str, text: str, folder: Path) -> None:
    """``inspect`` says what the first moment is the mean of, before and after a conversion."""
    _, run = record_of(source, folder)
    for path in (run / TAG, run / f"{TAG}_universal"):
        assert inspect(path).title.endswith(f"; Adapprox, {text}")


def inspected_codes(source: str, folder: Path) -> None:
    """A first moment in codes takes a byte an element and a scale a row, in full four."""
    _, run = record_of(source, folder)
    for path, least, most in ((run / TAG, 1.0, 1.2), (run / f"{TAG}_universal", 4.0, 4.0)):
        rows = [row for row in inspect(path).rows if math.prod(row.shape) > 1000]
        assert rows
        for row in rows:
            assert least <= row.first_bytes / math.prod(row.shape) <= most, (row, path)


G, U = ["gradient", "gradient"], ["update", "update"]
#: Of the kinds z2_mixed and z3_mixed.
M = ["update", "gradient"]

CASES: dict[str, Callable[[Path], None]] = {
    "gradient_stays_update": partial(keeps_own, "z1_2", G, "z3_update"),
    "update_stays_gradient": partial(keeps_own, "z3_update_2", U, "z1"),
    "paper_stays_gradient": partial(keeps_own, "z1_paper_2", U, "z3"),
    "gradient_stays_paper": partial(keeps_own, "z1_2", G, "z3_paper"),
    "mixed_stays_update": partial(keeps_own, "z2_mixed_2", M, "z3_update"),
    "gradient_stays_mixed": partial(keeps_own, "z1_2", G, "z3_mixed"),
    "gradient_taken_over": partial(takes_over, "z1_2", G, "z3_update"),
    "update_taken_over": partial(takes_over, "z3_update_2", U, "z1"),
    "mixed_taken_over": partial(takes_over, "z2_mixed_2", M, "z3"),
    "stock_gradient_z1": partial(stock, "z1_2", G, "z1", U),
    "stock_update_z1": partial(stock, "z3_update_2", U, "z1", G),
    "stock_gradient_z3": partial(stock, "z1_2", G, "z3", U),
    "stock_update_z3": partial(stock, "z3_update_2", U, "z3", G),
    "stock_mixed_z2": partial(stock, "z2_mixed_2", M, "z2", G),
    "stock_mixed_z3": partial(stock, "z2_mixed_2", M, "z3", M),
    "inspect_gradient": partial(inspected, "z1_2", "first moment of gradients"),
    "inspect_update": partial(inspected, "z3_update_2", "first moment of updates"),
    "inspect_codes": partial(inspected_codes, "z1_m8_f32_2"),
    "inspect_mixed": partial(inspected, "z2_mixed_2", "first moments by group: updates, gradients"),
}
