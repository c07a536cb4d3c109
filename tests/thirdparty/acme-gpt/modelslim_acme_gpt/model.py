# SPDX-License-Identifier: Apache-2.0
"""Acme's GPT: a decoder whose odd layers see the whole text and whose even layers see a window of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelslim_acme_gpt.tokenizer import VOCABULARY


@dataclass(frozen=True)
class Config:
    """What config.json says of the sizes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    window: int
    max_positions: int
    dtype: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """The sizes among the values of a config.json."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


class Layer(nn.Module):
    """One decoder layer: attention and a feed-forward part, each added to what comes in."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.sees_all = index % 2 == 1
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``hidden`` [1, tokens, hidden_size]; ``mask`` [tokens, tokens] is True where a token may look."""
        normed = self.norm(hidden)
        heads = self.qkv(normed).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(2))
        added: Tensor = self.down(functional.gelu(self.up(normed)))
        return hidden + added


class AcmeGPT(nn.Module):
    """The language model; its parameters have the names of the checkpoint's tensors."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window = config.window
        self.tokens = nn.Embedding(VOCABULARY, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        self.to(getattr(torch, config.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        """What goes into the first layer."""
        hidden: Tensor = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return hidden

    def masks(self, ids: Tensor) -> dict[bool, Tensor]:
        """The masks of the layers that see all and of those that do not."""
        ones = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        return {True: ones.tril(), False: ones.tril().triu(1 - self.window)}

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [1, tokens, vocabulary] of token ids [1, tokens]."""
        hidden, masks = self.embed(ids), self.masks(ids)
        for layer in self.layers:
            hidden = layer(hidden, masks[bool(layer.sees_all)])
        logits: Tensor = self.head(self.norm(hidden))
        return logits
