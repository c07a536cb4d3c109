# SPDX-License-Identifier: Apache-2.0
"""DeepSeek from V2 to V3.2: multi-token prediction layers, attention that picks tokens by an indexer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modelslim_transformers.mtp import MtpAdapter


class DeepSeekAdapter(MtpAdapter):
    """Serves the models that transformers builds as deepseek_v2 and deepseek_v3."""


class DeepSeekV32Adapter(DeepSeekAdapter):
    """Serves the models that transformers builds as deepseek_v32, whose attention picks tokens by an indexer."""

    def mtp_mask(self, model: Any, embeds: Tensor, positions: Tensor) -> Tensor | None:
        """A mask in any case: the indexer needs one, as in the model's own forward."""
        from transformers.masking_utils import create_causal_mask

        mask: Tensor | None = create_causal_mask(
            model.config, embeds, None, None, positions, allow_is_causal_skip=False
        )
        return mask
