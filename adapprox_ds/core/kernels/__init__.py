# SPDX-License-Identifier: Apache-2.0
"""What the kernels of all optimizers share: choosing, compiling and checking them."""
