# SPDX-License-Identifier: Apache-2.0
"""Trains one step on this container's device: fails where that does not lower the loss."""

import sys

import torch

from adapprox_ds import Adapprox

torch.manual_seed(0)
torch.set_num_threads(1)  # beside a training that needs the cores
device = "cuda" if torch.cuda.is_available() else "cpu"
model = torch.nn.Linear(64, 64, device=device)
optimizer = Adapprox(model.named_parameters(), lr=1e-3, rank_max=8)
x = torch.randn(16, 64, device=device)

before = model(x).square().mean()
before.backward()
optimizer.step()
after = model(x).square().mean()
print(f"{device}: loss {before.item():.4f}, after a step {after.item():.4f}")
if not after < before:  # a NaN too
    sys.exit("the step did not lower the loss")
