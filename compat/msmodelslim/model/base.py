# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.model.common.base import BaseModelAdapter

__all__ = ["BaseModelAdapter"]
