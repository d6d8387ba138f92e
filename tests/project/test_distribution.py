# SPDX-License-Identifier: Apache-2.0
"""The sdist, and its wheel in a folder of its own: a step, the command line and the configs."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from adapprox_ds.__main__ import main
from tests.project.pages import ROOT, printed

STEP = """
import sys, torch, adapprox_ds
from pathlib import Path
assert Path(adapprox_ds.__file__).is_relative_to(sys.argv[1]), adapprox_ds.__file__
p = torch.nn.Parameter(torch.ones(64, 64))
optimizer = adapprox_ds.Adapprox([p], lr=0.1)
p.grad = torch.ones(64, 64)
optimizer.step()
assert not torch.equal(p.detach(), torch.ones(64, 64))
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.core.kernels import squares
from adapprox_ds.micro_adam.kernels import native_windows
for library in (native_pass.LIBRARY, native_windows.LIBRARY, squares.LIBRARY):
    assert all(file.is_relative_to(sys.argv[1]) and file.exists() for file in library.files)
"""


def run(*command: str, folder: Path) -> str:
    """With the installed package alone on the path."""
    return printed(command, folder, PYTHONPATH=str(folder))


def test_the_distributions(tmp_path: Path) -> None:
    """Hold the C++ sources and the configs, and work without the repository."""
    # A build leaves folders in its source.
    source = tmp_path / "source"
    for name in ("adapprox_ds", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt")
    pages = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
    for name in (*files, *pages, "CITATION.cff"):
        shutil.copy(ROOT / name, source / name)
    (source / "tests").mkdir()
    (source / "tests" / "test_x.py").touch()
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), folder=source)
    (sdist,) = tmp_path.glob("adapprox_ds-*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {*pages, "ds_configs/ds_adapprox.json", "adapprox_ds/py.typed"} <= held
    assert "tests/test_x.py" not in held
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    made = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    run(*pip, *made, folder=tmp_path)
    (wheel,) = tmp_path.glob("adapprox_ds-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.startswith(("tests/", "examples/")) for name in names)
    folder = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--target", str(folder), str(wheel), folder=tmp_path)
    run(sys.executable, "-c", STEP, str(folder), folder=folder)
    listed = run(sys.executable, "-m", "adapprox_ds", "configs", folder=folder).split()
    assert listed == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
    printed = run(str(folder / "bin" / "adapprox-ds"), "configs", "ds_adapprox", folder=folder)
    assert json.loads(printed) == json.loads((ROOT / "ds_configs/ds_adapprox.json").read_text())


def test_configs_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there stays; an unknown name is answered with the names there are."""
    path = tmp_path / "config.json"
    assert main(["configs", "ds_adapprox_zero3.json", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 3
    path.write_text("mine")
    for arguments, message in (
        (["configs", "ds_adapprox", "-o", str(path)], "File exists"),
        (["configs", "ds_other"], "config 'ds_other' is not allowed; allowed: ds_adamw, "),
        (["configs", "-o", str(path)], "NAME is required"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == "mine"
