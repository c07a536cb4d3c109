# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import FA3QuantAdapterInterface

__all__ = ["FA3QuantAdapterInterface"]
