# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import AWQInterface

__all__ = ["AWQInterface"]
