# SPDX-License-Identifier: Apache-2.0
"""Everything that deals with DeepSpeed: its configuration, its engine, and what its shards contain.

Importing this package also sets the function that finds the shards of an optimizer that was never
attached to an engine.
"""

from adapprox_ds.core.shards import set_resolver
from adapprox_ds.matrix_views import MatrixViews
from adapprox_ds.zero import unattached

__all__ = ["MatrixViews"]

set_resolver(unattached.find)
