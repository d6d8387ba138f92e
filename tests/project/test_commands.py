# SPDX-License-Identifier: Apache-2.0
"""Commands that the pages show and no test of its own runs: they are understood as they stand."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from adapprox_ds.__main__ import build_parser, main
from tests import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "docker/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What the examples' commands go on from.
MADE = (
    "checkpoints/latest",
    "runs/accelerate/step-100/latest",
    "runs/pretrain-tiny/model/config.json",
)


def lines(page: Path, *languages: str) -> list[str]:
    return [
        line
        for language, block in FENCE.findall(page.read_text())
        if language in languages
        for line in block.splitlines()
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def example(script: str) -> ModuleType:
    """An example's script as a module: several are called train.py."""
    spec = importlib.util.spec_from_file_location(Path(script).parent.name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES = [
    line
    for page in PAGES
    # The integrations' scripts need their tools; tests/zero/test_integrations.py runs them.
    if page.parent.parent.name == "examples" and page.parent.name != "integrations"
    for line in lines(page, "")
    if line.startswith("deepspeed ")
]


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_examples_commands_are_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launcher and by the script; that the examples train is tested elsewhere."""
    for name in ("examples", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in MADE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    launched = parse_deepspeed(shlex.split(command)[1:])
    monkeypatch.setattr("sys.argv", [launched.user_script, *launched.user_args])
    parsed = example(launched.user_script).parse_arguments()
    assert Path(getattr(parsed, "deepspeed_config", None) or parsed.deepspeed).is_file()


def test_there_are_such_commands() -> None:
    """Else the one above holds for nothing."""
    assert len(EXAMPLES) > 10


def ours() -> list[tuple[str, str]]:
    """The package's own commands, from blocks and from the text, with their pages."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
        for line in [*(" ".join(text.split()) for text in inline), *lines(page, "", "bash")]:
            command = re.fullmatch(r"(?:python -m adapprox_ds|adapprox-ds) ([a-z]+ .+)", line)
            if command:
                found.append((name_of(page), command[1]))
    return found


@pytest.mark.parametrize(("page", "command"), ours())
def test_the_packages_commands_are_understood(page: str, command: str) -> None:
    build_parser().parse_args(shlex.split(command))


def test_the_config_of_the_memory_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command writes one, and doctor has nothing against it."""
    (command,) = [c for page, c in ours() if page == "docs/memory.md" and c.startswith("configure")]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == "wrote ds_config.json\n"
    assert main(["doctor", "--seconds", "0", "ds_config.json"]) == 0


def test_scripts_and_targets_that_are_named_are_there() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    scripts = set(re.findall(r"\b(?:examples|tests|docker)/[\w/-]+\.(?:py|sh|yaml)\b", text))
    assert len(scripts) > 15
    assert [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make\s([a-z-]+)", text, re.MULTILINE))
    assert len(named) > 4
    assert named <= targets


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are named."""
    assert main([]) == 2
    said = capsys.readouterr().err
    assert all(command in said for command in ("convert", "estimate", "configure", "doctor"))
