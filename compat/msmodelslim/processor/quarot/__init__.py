# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import (
    LAOSOnlineRotationInterface,
    OnlineQuaRotInterface,
    QuaRotInterface,
    RotatePair,
)

__all__ = ["LAOSOnlineRotationInterface", "OnlineQuaRotInterface", "QuaRotInterface", "RotatePair"]
