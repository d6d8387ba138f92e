# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory with Adapprox, which the DeepSpeed config of the YAML names.

torchrun --nproc-per-node 2 examples/integrations/llamafactory_v0.py config.yaml
"""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

import adapprox_ds
from adapprox_ds.integrations.trainer import CheckOptimizer

if __name__ == "__main__":
    adapprox_ds.register()
    run_exp(callbacks=[CheckOptimizer()])
