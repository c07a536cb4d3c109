# SPDX-License-Identifier: Apache-2.0
"""DeepSeek from V2 to V3.2: checkpoints in block-wise float8, multi-token prediction layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modelslim.api import DecodedTensor, StoredTensor, hookimpl
from modelslim_deepseek.fp8 import block_size, decoded_tensors
from modelslim_transformers.mtp import MtpAdapter


class DeepSeekAdapter(MtpAdapter):
    """Serves the models that transformers builds as deepseek_v2 and deepseek_v3."""

    @cached_property
    def config(self) -> Any:
        """The model's configuration, without the entry that says how its weights are stored in float8."""
        config = super().config
        self._block = block_size(getattr(config, "quantization_config", None))
        if self._block is not None:
            del config.quantization_config
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; bfloat16 where only float8 weights could tell."""
        stated: torch.dtype | None = self.config.dtype
        return stated or torch.bfloat16 if self._block else super().dtype

    @hookimpl
    def get_decoded_tensors(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, DecodedTensor]:
        """The weights that are stored in float8, in the model's dtype."""
        dtype = self.dtype
        return decoded_tensors(tensors, self._block, dtype) if self._block else {}


class DeepSeekV32Adapter(DeepSeekAdapter):
    """Serves the models that transformers builds as deepseek_v32, whose attention picks tokens by an indexer."""

    def mtp_mask(self, model: Any, embeds: Tensor, positions: Tensor) -> Tensor | None:
        """A mask in any case: the indexer needs one, as in the model's own forward."""
        from transformers.masking_utils import create_causal_mask

        mask: Tensor | None = create_causal_mask(
            model.config, embeds, None, None, positions, allow_is_causal_skip=False
        )
        return mask
