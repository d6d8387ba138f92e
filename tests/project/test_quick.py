# SPDX-License-Identifier: Apache-2.0
"""``make quick``: which files it runs, and that they need no DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import conftest
from tests.quick import TESTS, is_quick, obstacles, quick_files

ROOT = TESTS.parent
#: What people who change the algebra need, and what needs more than torch.
ALGEBRA = (
    "algebra",
    "oracle",
    "optimizer",
    "layout",
    "moment",
    "quantized",
    "rank_srsi",
    "reshard",
)
OTHERS = ("stages", "universal", "nccl", "doctor", "kernels", "measured_memory", "quick")


def test_the_files() -> None:
    names = {path.stem.removeprefix("test_") for path in quick_files()}
    assert names >= set(ALGEBRA)
    assert not names & set(OTHERS)


@pytest.mark.parametrize(
    ("source", "quick"),
    [
        ("import torch\nfrom adapprox_ds.adapprox import algebra", True),
        ("from adapprox_ds import Adapprox", True),
        ("from adapprox_ds.core.layout import ShardLayout", True),
        ("from adapprox_ds.zero import discover", False),
        ("import adapprox_ds", False),
        ("from adapprox_ds import initialize", False),
        ("import torch, adapprox_ds.zero", False),
        ("def f():\n    import deepspeed", False),
        ("from deepspeed.utils import groups", False),
        ("import subprocess", False),
    ],
)
def test_the_rule(source: str, quick: bool) -> None:
    assert (not obstacles(source)) == quick


def test_the_rule_follows_modules_of_tests() -> None:
    """test_resume.py itself imports no DeepSpeed; a module that it imports does."""
    assert not obstacles((TESTS / "checkpoint/test_resume.py").read_text())
    assert not is_quick(TESTS / "checkpoint/test_resume.py")


def test_the_option_makes_deepspeed_unimportable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    for quick in (False, True):
        config = cast(Any, SimpleNamespace(getoption=lambda name, given=quick: given))
        conftest.pytest_configure(config)
        assert ("deepspeed" in sys.modules) == quick
        left_out = conftest.pytest_ignore_collect(TESTS / "zero/test_stages.py", config)
        assert left_out is (True if quick else None)
        assert conftest.pytest_ignore_collect(TESTS / "adapprox/test_algebra.py", config) is None
    with pytest.raises(ImportError):
        __import__("deepspeed")


def test_they_are_collected_without_deepspeed() -> None:
    """Blocked here, apart from the option; they run so whenever ``make quick`` does."""
    code = (
        "import sys; sys.modules['deepspeed'] = None; import pytest\n"
        "sys.exit(pytest.main(['--quick', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {path.relative_to(ROOT).as_posix() for path in quick_files()}
