# SPDX-License-Identifier: Apache-2.0
"""MatrixViews, which lets any optimizer of matrices step ZeRO's flat shards."""

from adapprox_ds.matrix_views.optimizer import MatrixViews

__all__ = ["MatrixViews"]
