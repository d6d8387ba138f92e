# SPDX-License-Identifier: Apache-2.0
"""What every optimizer of this package is made of; needs torch alone and knows none of them."""
