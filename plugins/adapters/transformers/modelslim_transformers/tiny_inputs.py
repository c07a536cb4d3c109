# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a tiny model, as its processor would give them."""

from __future__ import annotations

from typing import Any

import torch

from modelslim_transformers.tiny_config import FREE_TOKENS, special_tokens

LENGTHS = (9, 14)
"""Tokens of the inputs, more than the windows of a tiny model hold."""


def make_inputs(config: Any) -> list[dict[str, Any]]:
    """Arguments of the model's forward, one mapping per sample."""
    taken = set(special_tokens(config.to_dict()))
    words = torch.tensor([token for token in range(FREE_TOKENS) if token not in taken])
    return [{"input_ids": words[torch.randint(len(words), (1, length))]} for length in LENGTHS]
