# SPDX-License-Identifier: Apache-2.0
"""The base class of text adapters."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from msmodelslim.core.const import DeviceType
from msmodelslim.model.common.base import ConfiguredModelAdapter
from msmodelslim.utils.exception import SchemaValidateError
from msmodelslim.utils.security.model import SafeGenerator


class TransformersModel(ConfiguredModelAdapter):
    """Loads a causal language model and turns texts into inputs."""

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded when it is first asked for."""
        return self._load_tokenizer(trust_remote_code=self.trust_remote_code)

    def _load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        return SafeGenerator.get_tokenizer_from_pretrained(self.model_path, trust_remote_code=trust_remote_code)

    def _load_model(self, device: DeviceType = DeviceType.NPU) -> nn.Module:
        model: nn.Module = SafeGenerator.get_model_from_pretrained(
            self.model_path, config=self.config, dtype="auto", trust_remote_code=self.trust_remote_code
        )
        return model

    def _get_tokenized_data(
        self,
        calib_list: list[Any],
        device: DeviceType = DeviceType.NPU,
        input_ids_name: str = "input_ids",
        attention_mask_name: str = "attention_mask",
        padding: bool = False,
    ) -> list[list[Tensor]]:
        """[ids, mask] of each text, both [1, tokens]; a chat goes through the chat template."""
        _require_list(calib_list)
        result = []
        for sample in calib_list:
            if isinstance(sample, str):
                tokens = self.tokenizer(sample, return_tensors="pt", padding=padding)
            else:
                tokens = self.tokenizer.apply_chat_template(sample, return_tensors="pt", return_dict=True)
            result.append([tokens[name].to(device.value) for name in (input_ids_name, attention_mask_name)])
        return result

    def _get_batch_tokenized_data(
        self, calib_list: list[Any], batch_size: int, device: DeviceType = DeviceType.NPU
    ) -> list[list[Tensor]]:
        """[ids] of each batch, [batch, tokens], shorter texts filled up with 0."""
        _require_list(calib_list)
        batches = [calib_list[start : start + batch_size] for start in range(0, len(calib_list), batch_size)]
        return [self._get_padding_data(batch, device) for batch in batches]

    def _get_padding_data(self, calib_list: list[Any], device: DeviceType = DeviceType.NPU) -> list[Tensor]:
        tokens = [self.tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in calib_list]
        ids = [one["input_ids"][0] for one in tokens]
        return [torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0).to(device.value)]


def _require_list(samples: Any) -> None:
    if not isinstance(samples, list):
        raise SchemaValidateError(f"calib_list is {type(samples).__name__}, not a list")
