# SPDX-License-Identifier: Apache-2.0
"""Imports what takes seconds to import, in the process that a session's ranks are forked off."""

import gc
from importlib import import_module

for name in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "setuptools",
    "pytest",
    "adapprox_ds.checkpoint",
    "adapprox_ds.report.monitor",
    "adapprox_ds.zero",
):
    import_module(name)

# DeepSpeed collects garbage several times an engine. To look through all of the above each time
# would take a third of the tests' time.
gc.collect()
gc.freeze()
