# SPDX-License-Identifier: Apache-2.0
"""An import path of the existing tool."""

from msmodelslim.core.graph.adapter_types import AdapterConfig, FusionConfig, MappingConfig

__all__ = ["AdapterConfig", "FusionConfig", "MappingConfig"]
