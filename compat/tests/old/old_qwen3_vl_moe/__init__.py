# SPDX-License-Identifier: Apache-2.0
"""An adapter for the existing tool."""

from .model_adapter import Qwen3VLMoeModelAdapter

__all__ = ["Qwen3VLMoeModelAdapter"]
