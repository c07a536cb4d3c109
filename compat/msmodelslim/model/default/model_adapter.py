# SPDX-License-Identifier: Apache-2.0
"""An adapter of any causal language model, which others build on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import nn

from modelslim.api import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.interfaces import ModelInfoInterface, PipelineInterface
from msmodelslim.model.common.layer_wise_forward import (
    generated_decoder_layer_visit_func,
    transformers_generated_forward_func,
)
from msmodelslim.model.common.transformers import TransformersModel


class DefaultModelAdapter(TransformersModel, ModelInfoInterface, PipelineInterface):
    """Its units are the decoder layers."""

    def get_model_type(self) -> str:
        """The model's name."""
        return self.model_type

    def get_model_pedigree(self) -> str:
        """``default``."""
        return "default"

    def load_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        """The model."""
        return self._load_model(device)

    def handle_dataset(self, dataset: Any, device: DeviceType = DeviceType.NPU) -> list[Any]:
        """[ids, mask] of each text."""
        return self._get_tokenized_data(dataset, device)

    def handle_dataset_by_batch(self, dataset: Any, batch_size: int, device: DeviceType = DeviceType.NPU) -> list[Any]:
        """[ids] of each batch of texts."""
        return self._get_batch_tokenized_data(dataset, batch_size, device)

    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        """The model."""
        return self._load_model(device)

    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        """The decoder layers."""
        yield from generated_decoder_layer_visit_func(model)

    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, Any]:
        """The model's own forward, stopping at the decoder layers."""
        return (yield from transformers_generated_forward_func(model, inputs))

    def enable_kv_cache(self, model: nn.Module, need_kv_cache: bool) -> None:
        """Switch the cache."""
        self._enable_kv_cache(model, need_kv_cache)
