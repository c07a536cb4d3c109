# SPDX-License-Identifier: Apache-2.0
"""Which attentions show their keys and values to a cache, against what transformers itself keeps in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modelslim.api import CapabilityError
from modelslim_transformers.adapter import TransformersAdapter

LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8} | {
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [("llama", {}), ("qwen3", {"head_dim": 8}), ("gemma2", {"head_dim": 8}), ("llama", {"vocab_size": 40})],
)
def test_every_layer_has_a_cache_of_the_shape_that_transformers_keeps(
    model_type: str, more: dict[str, Any], stored: Callable[..., Path], common: Mapping[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    path = stored(model_type, **{**common, **more})
    adapter = TransformersAdapter(model_type, path)
    found = adapter.get_kv_caches(adapter.init_model("meta"))
    layers = AutoModelForCausalLM.from_pretrained(path)(
        torch.tensor([[1, 2, 3]]), use_cache=True
    ).past_key_values.layers
    assert [one.attention for one in found] == [f"model.layers.{index}.self_attn" for index in range(len(layers))]
    for one, layer in zip(found, layers, strict=True):
        assert layer.keys.shape == layer.values.shape == (1, one.heads, 3, one.head_size)
        assert (one.keys, one.values) == (f"{one.attention}.k_proj", f"{one.attention}.v_proj")


@pytest.mark.parametrize(("model_type", "more"), [("deepseek_v3", LATENT), ("phi3", {})])
def test_attention_that_keeps_something_else_or_makes_it_otherwise_has_none(
    model_type: str, more: dict[str, Any], stored: Callable[..., Path], common: Mapping[str, Any]
) -> None:
    adapter = TransformersAdapter(model_type, stored(model_type, **{**common, **more}))
    assert adapter.get_kv_caches(adapter.init_model("meta")) == []


def test_architecture_that_cannot_be_made_tiny_says_why(
    stored: Callable[..., Path], common: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = TransformersAdapter("llama", stored("llama", **common))
    monkeypatch.setattr("modelslim_transformers.tiny.MOST_PARAMETERS", 10)
    with pytest.raises(CapabilityError, match="nothing can be proven of the caches"):
        adapter.get_kv_caches(adapter.init_model("meta"))
