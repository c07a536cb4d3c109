# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from modelslim.api import ProcessRequest

__all__ = ["ProcessRequest"]
