# SPDX-License-Identifier: Apache-2.0
"""MicroAdam, an Adam whose state is a window of sparse gradients and a quantised error feedback."""
