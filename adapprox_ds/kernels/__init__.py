# SPDX-License-Identifier: Apache-2.0
"""The two passes over a matrix's elements that a tracking step makes; V is never written out."""

from adapprox_ds.kernels.interface import FirstPass, SecondPass, StepScalars
from adapprox_ds.kernels.tiles import first_pass, second_pass

__all__ = ["FirstPass", "SecondPass", "StepScalars", "first_pass", "second_pass"]
