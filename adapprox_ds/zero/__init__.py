# SPDX-License-Identifier: Apache-2.0
"""Where matrices lie in ZeRO's flat shards, and how the optimizer is registered with DeepSpeed."""

from adapprox_ds.zero.matrix_views import MatrixViews

__all__ = ["MatrixViews"]
