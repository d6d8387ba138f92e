# SPDX-License-Identifier: Apache-2.0
"""Classes that training tools import by path. Each module needs its tool; nothing imports them."""
