# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.interfaces import AscendV1GlobalModelDtypeInterface, AscendV1SaveInterface

__all__ = ["AscendV1GlobalModelDtypeInterface", "AscendV1SaveInterface"]
