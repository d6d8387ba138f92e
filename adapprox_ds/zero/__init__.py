# SPDX-License-Identifier: Apache-2.0
"""Where matrices lie in ZeRO's flat shards, and how the optimizer is registered with DeepSpeed."""

from adapprox_ds.core.shards import set_resolver
from adapprox_ds.matrix_views import MatrixViews
from adapprox_ds.zero import unattached

__all__ = ["MatrixViews"]

set_resolver(unattached.find)
