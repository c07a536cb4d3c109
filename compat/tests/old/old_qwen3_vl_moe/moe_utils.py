# SPDX-License-Identifier: Apache-2.0
"""The helpers that the integration guide leaves to its reader; weights as transformers 4 held them."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class UnstackedQwen3VLMoeTextMLP(nn.Module):
    def __init__(self, config, dtype=None):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False, dtype=dtype)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UnstackedQwen3VLMoeSparseMoeBlock(nn.Module):
    """The block with one nn.Linear per expert and projection; fused weights are [experts, in, out]."""

    def __init__(self, config, original):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        dtype = original.gate.weight.dtype
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False, dtype=dtype)
        self.experts = nn.ModuleList(UnstackedQwen3VLMoeTextMLP(config, dtype) for _ in range(config.num_experts))
        with torch.no_grad():
            self.gate.weight.copy_(original.gate.weight)
            width = config.moe_intermediate_size
            for index, expert in enumerate(self.experts):
                gate_up = original.experts.gate_up_proj[index]
                expert.gate_proj.weight.copy_(gate_up[:, :width].t())
                expert.up_proj.weight.copy_(gate_up[:, width:].t())
                expert.down_proj.weight.copy_(original.experts.down_proj[index].t())

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        weights = torch.softmax(self.gate(hidden_states), dim=-1, dtype=torch.float)
        weights, chosen = torch.topk(weights, self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(hidden_states.dtype)
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            if len(token):
                result.index_add_(0, token, expert(hidden_states[token]) * weights[token, slot, None])
        return result.reshape(shape)
