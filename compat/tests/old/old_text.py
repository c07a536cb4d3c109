# SPDX-License-Identifier: Apache-2.0
"""A text adapter as the existing tool has it: nothing of its own but names."""

from collections.abc import Generator
from typing import Any

from torch import nn

from msmodelslim.core.base.protocol import ProcessRequest
from msmodelslim.core.const import DeviceType
from msmodelslim.model.common.layer_wise_forward import (
    generated_decoder_layer_visit_func,
    transformers_generated_forward_func,
)
from msmodelslim.model.common.transformers import TransformersModel
from msmodelslim.model.interface_hub import ModelInfoInterface, ModelSlimPipelineInterfaceV1
from msmodelslim.utils.logging import logger_setter


@logger_setter()
class OldText(TransformersModel, ModelInfoInterface, ModelSlimPipelineInterfaceV1):
    def get_model_type(self):
        return self.model_type

    def get_model_pedigree(self):
        return "x"

    def handle_dataset(self, dataset: Any, device: DeviceType = DeviceType.NPU) -> list[Any]:
        return self._get_tokenized_data(dataset, device)

    def init_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        return self._load_model(device)

    def generate_model_visit(self, model: nn.Module) -> Generator[ProcessRequest, Any, None]:
        yield from generated_decoder_layer_visit_func(model)

    def generate_model_forward(self, model: nn.Module, inputs: Any) -> Generator[ProcessRequest, Any, None]:
        yield from transformers_generated_forward_func(model, inputs)

    def enable_kv_cache(self, model: nn.Module, need_kv_cache: bool) -> None:
        return self._enable_kv_cache(model, need_kv_cache)
