# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import AdaptRotationInterface

__all__ = ["AdaptRotationInterface"]
