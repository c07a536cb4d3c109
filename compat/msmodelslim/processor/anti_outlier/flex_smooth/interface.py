# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import FlexSmoothQuantInterface

__all__ = ["FlexSmoothQuantInterface"]
