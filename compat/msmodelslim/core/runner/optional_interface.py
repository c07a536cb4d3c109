# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import LayerWiseOffloadOptionalInterface

__all__ = ["LayerWiseOffloadOptionalInterface"]
