# SPDX-License-Identifier: Apache-2.0
"""Any matrix optimizer on ZeRO's shards: it is given matrices that view them."""

from adapprox_ds.matrix_views.optimizer import MatrixViews

__all__ = ["MatrixViews"]
