# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md, the version and the pages for developers: what they claim."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapprox_ds
from adapprox_ds.__main__ import main
from tests import ROOT

#: Calls that let foreign code or objects in.
GATE = re.compile(
    r"(torch\.((hub|jit|utils\.cpp_extension)\.)?load\w*|pickle\.\w+|(.*\.)?Unpickler|ctypes\.CDLL"
    r"|subprocess\.\w+|os\.(system|popen|exec\w+|spawn\w+)|eval|exec|__import__"
    r"|(.*\.)?urlopen|(.*\.)?(Pool|\w+PoolExecutor)"
    r"|(.*\.)?((all_)?gather_object|(broadcast|scatter|send|recv)_object_list)"
    r"|transformers\..*|(.*\.)?from_(pretrained|config))"
)
#: Errors that are raised, not calls into anything.
HARMLESS = ("pickle.UnpicklingError",)


def gates(source: str) -> list[str]:
    """Calls in a module that let code in."""
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return [call for call in calls if GATE.fullmatch(call) and call not in HARMLESS]


def test_the_list_of_gates_is_whole() -> None:
    """Neither a module too few nor one too many."""
    listed = re.findall(r"^\| `(adapprox_ds/.*?)` \|", (ROOT / "SECURITY.md").read_text(), re.M)
    found = {
        path.relative_to(ROOT).as_posix(): calls
        for path in sorted((ROOT / "adapprox_ds").rglob("*.py"))
        if (calls := gates(path.read_text()))
    }
    assert listed == list(found), found


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("torch.load(x)", True),
        ("subprocess.run(x)", True),
        ("pickle.Unpickler(f).load()", True),
        ("dist.all_gather_object(a, b)", True),
        ("eval(x)", True),
        ("ThreadPoolExecutor()", True),
        ("json.loads(x)", False),
        ("run(options)", False),
    ],
)
def test_the_gate_keeper(source: str, seen: bool) -> None:
    assert bool(gates(source)) == seen


def test_a_configs_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is the user asked whether it may be, as transformers would by itself."""

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for kind, name in (("mine", "Mine"), ("gpt2", "Mine"), ("gpt2", "is_torch_available")):
        config = {
            "model_type": kind,
            "architectures": [name],
            "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Mine"},
            "n_layer": 1,
            "n_embd": 64,
            "n_head": 2,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        arguments = ["estimate", "--model", str(tmp_path), "--stage", "2", "--world", "2"]
        if kind == "gpt2":  # transformers' own class is used instead
            assert main(arguments) == 0
            assert "M parameters" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                main(arguments)
            assert "transformers cannot build it" in capsys.readouterr().err
    assert asked == []
    assert not (tmp_path / "ran").exists()


def test_the_version_is_in_one_place() -> None:
    """setup.py takes it from there; nothing else in the repository states it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == adapprox_ds.__version__, done.stderr
    stated = re.compile(rf"(?<![\d.=]){re.escape(adapprox_ds.__version__)}(?![\d.])")
    for name in ("README.md", "CITATION.cff", "setup.py", "Makefile", "mkdocs.yml", "SECURITY.md"):
        assert not stated.search((ROOT / name).read_text()), name
    assert not any(stated.search(path.read_text()) for path in (ROOT / "docs").glob("*.md"))


#: The pages for those who change the code.
INSIDE = ("ARCHITECTURE.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("page", INSIDE)
def test_files_and_names_on_the_inside_pages_are_there(page: str) -> None:
    """A page that names what was moved or renamed would send its reader astray."""
    text = (ROOT / page).read_text()
    package = ROOT / "adapprox_ds"
    places = (ROOT, package, *package.iterdir(), *package.glob("*/kernels"))
    spans = {span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[\w./*-]+", span)}
    files = {span for span in spans if re.search(r"\.(py|md|h|cpp|yaml)$", span)}
    assert len(files) > 20
    assert [f for f in sorted(files) if not any(list(place.glob(f)) for place in places)] == []
    sources = [ROOT / "Makefile", *package.rglob("*.py"), *ROOT.glob("tests/**/*.py")]
    sources += package.glob("*/kernels/*.h")
    words = {word for path in sources for word in re.findall(r"\w+", path.read_text())}
    names = {part for span in spans - files for part in re.findall(r"\w+", span)}
    assert len(names) > 20
    assert sorted(names - words) == []


@pytest.mark.parametrize("page", INSIDE)
def test_names_are_in_the_files_that_they_are_said_to_be_in(page: str) -> None:
    """As in "`solve` (`adapprox/algebra.py`)" and "`join` in `adapprox/reshard.py`"."""
    text = (ROOT / page).read_text()
    pairs = re.findall(r"`([\w.]+)`\s+(?:in\s+|of\s+|\()`([\w/]+\.\w+)`", text)
    assert len(pairs) > 10
    for name, file in pairs:
        found = [*ROOT.glob(file), *ROOT.glob(f"adapprox_ds/{file}"), *ROOT.glob(f"*/*/{file}")]
        found += ROOT.glob(f"adapprox_ds/*/kernels/{file}")
        assert found, file
        words = set(re.findall(r"\w+", found[0].read_text()))
        assert set(name.split(".")) <= words, (name, file)
