# SPDX-License-Identifier: Apache-2.0
"""Writes pip's configuration for a build, and prints what the build has to mount for it.

pip_mounts.py FOLDER: the configuration of files and environment becomes FOLDER/pip.conf; a line of
output is HOST:BUILD, a file or a folder that it names.
"""

import ast
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

CERTIFICATES = "/etc/pip-certificates.pem"


def main(folder: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    # Of several sources of one option the environment, listed first, has the last word in pip.
    options: dict[str, str] = {}
    for line in reversed(listed.stdout.splitlines()):
        name, value = line.split("=", 1)
        options[name.split(".", 1)[1]] = ast.literal_eval(value)
    folders = set()
    for name, value in options.items():
        if name == "cert":
            continue
        for word in value.split():
            place = urlparse(word)
            if place.scheme in ("", "file") and place.path.startswith("/"):
                # An index in a folder leads to files beside it.
                path = Path(place.path)
                folders.add(path.parent if place.scheme else path)
    if "cert" in options:
        # Not at its own place, where the build installs its own.
        print(f"{options['cert']}:{CERTIFICATES}")
        options["cert"] = CERTIFICATES
    written = "".join(f"{name} = {value}\n" for name, value in options.items())
    (folder / "pip.conf").write_text(f"[global]\n{written}")
    print(f"{folder / 'pip.conf'}:/etc/pip.conf")
    for path in sorted(filter(Path.exists, folders)):
        print(f"{path}:{path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
