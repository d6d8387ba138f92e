# SPDX-License-Identifier: Apache-2.0
"""Packaging of adapprox-ds."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Reads the version from its file: importing the package would import torch."""
    text = (ROOT / "adapprox_ds" / "_version.py").read_text()
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("adapprox_ds/_version.py has no __version__")
    return match[1]


def read_description() -> str:
    """Reads the README, where there is one."""
    readme = ROOT / "README.md"
    return readme.read_text("utf-8") if readme.exists() else ""


setup(
    name="adapprox-ds",
    version=read_version(),
    description="Adapprox for DeepSpeed: Adam with a low-rank second moment that works inside ZeRO",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["adapprox_ds", "adapprox_ds.*"]), "adapprox_ds.ds_configs"],
    package_dir={"adapprox_ds.ds_configs": "ds_configs"},
    package_data={
        "adapprox_ds": ["py.typed", "*/kernels/*.cpp", "*/kernels/*.h"],
        "adapprox_ds.ds_configs": ["*.json"],
    },
    entry_points={"console_scripts": ["adapprox-ds = adapprox_ds.__main__:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "deepspeed>=0.16.9"],
    extras_require={
        "examples": [
            "transformers>=5.0",
            "accelerate>=1.1",
            "sentencepiece>=0.2",
            "tqdm>=4.60",
            "matplotlib>=3.7",
        ],
        "watch": ["rich>=13.0"],
        "mpi": ["mpi4py>=4.0"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "allpairspy>=2.5",
            "accelerate>=1.1",
            "peft>=0.17",
            "ruff",
            "mypy",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
