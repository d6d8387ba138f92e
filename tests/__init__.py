# SPDX-License-Identifier: Apache-2.0
"""The tests, in the rooms of the package; what several rooms share lies here."""

from pathlib import Path

#: The root of the checkout.
ROOT = Path(__file__).resolve().parent.parent
