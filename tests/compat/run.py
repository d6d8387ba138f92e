# SPDX-License-Identifier: Apache-2.0
"""Runs a part of the tests with each supported release of DeepSpeed, and writes what passed.

``python tests/compat/run.py [RELEASE ...]`` installs each release alone into a folder
(build/deepspeed/RELEASE, beside the torch that is installed), puts that folder first on the path
of a pytest process, and keeps the outcome in build/compatibility.json, from which it writes
docs/compatibility.md. Releases that were not run again keep their last outcome.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "compatibility.json"
TABLE = ROOT / "docs" / "compatibility.md"
#: What is run, by the name of its column.
PARTS = {
    "every config": ["tests/test_configs.py"],
    "every stage": ["tests/test_stages.py"],
    "resume": ["tests/test_resume.py"],
    "convert, `load_universal`": ["tests/test_universal.py"],
    "MatrixViews": ["tests/test_matrix_views.py"],
}


def pinned() -> str:
    """The release that constraints.txt pins, against which all tests are run."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("deepspeed=="))


def releases() -> list[str]:
    """The oldest supported release, some between, the pinned one."""
    return [*RELEASES, pinned()]


#: Beside the pinned one.
RELEASES = ("0.18.4", "0.18.9", "0.19.0")


def installed(release: str) -> Path:
    """A folder that holds the release and nothing else; made where there is none."""
    folder = ROOT / "build" / "deepspeed" / release
    if not (folder / f"deepspeed-{release}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        pip += ["--no-build-isolation", "--target", str(folder), f"deepspeed=={release}"]
        subprocess.run(pip, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
    return folder


def run_part(release: str, files: list[str]) -> dict[str, Any]:
    """Run tests with a release: the numbers of those that passed and failed, and what failed."""
    folder = installed(release)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "DS_ACCELERATOR": "cpu",
    }
    found = subprocess.run(
        [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    if found != release:
        raise RuntimeError(f"{folder} should hold DeepSpeed {release} and holds {found}")
    start = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    subprocess.run([*pytest, f"--junitxml={report}"], cwd=ROOT, env=environment)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(time.monotonic() - start),
    }


def write_table(results: dict[str, dict[str, Any]]) -> None:
    """The outcome as docs/compatibility.md."""
    lines = [
        "# Releases of DeepSpeed",
        "",
        "Written by `make compat`, which runs these tests with each release of DeepSpeed, beside "
        "the torch of",
        "`constraints.txt`, on CPU ranks; not by hand. A cell is the number of tests that passed, "
        "of those that ran.",
        "",
        "| DeepSpeed | " + " | ".join(PARTS) + " |",
        "|---|" + "---|" * len(PARTS),
    ]
    for release in sorted(results, key=lambda r: [int(n) for n in r.split(".")]):
        cells = []
        for part in PARTS:
            outcome = results[release].get(part)
            if outcome is None:
                cells.append("not run")
            else:
                ran = outcome["passed"] + len(outcome["failed"])
                cells.append(f"{outcome['passed']} of {ran}")
        lines.append(f"| {release} | " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n")


def main(chosen: list[str]) -> int:
    """Run, write, and say whether all passed."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    good = True
    for release in chosen or releases():
        results[release] = {}
        for part, files in PARTS.items():
            print(f"DeepSpeed {release}: {part}", flush=True)
            results[release][part] = outcome = run_part(release, files)
            good = good and outcome["passed"] > 0 and not outcome["failed"]
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
