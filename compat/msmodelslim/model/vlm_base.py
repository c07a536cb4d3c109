# SPDX-License-Identifier: Apache-2.0
"""The import path and the name that the integration guide uses."""

from msmodelslim.model.common.vlm_base import VLMBaseModelAdapter, VlmBaseModelAdapter

__all__ = ["VLMBaseModelAdapter", "VlmBaseModelAdapter"]
