# SPDX-License-Identifier: Apache-2.0
"""What a run can tell about itself: diagnostics that read the optimizer and never change it."""
