# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Small matrices on few cores: one thread a process is fastest by far."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
