# SPDX-License-Identifier: Apache-2.0
"""The adapter on tiny models of many architectures, against transformers' own loader and forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelslim.testing.adapter import AdapterContract, OpenModel
from modelslim_transformers.adapter import TransformersAdapter

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **HYBRID,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
GROUPS = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24} | {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 4},
    "gemma2": {**SLIDING, "head_dim": 8},
    "gemma3_text": {**SLIDING, "head_dim": 8},
    "gpt_oss": {**SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 40, "head_dim": 8},
    "qwen3_5_text": {**DELTA, "head_dim": 8},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "olmo2": {},
    "olmoe": EXPERTS,
    "deepseek_v3": {**GROUPS, **LATENT},
    "glm4_moe": {**GROUPS, "head_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 4},
    "stablelm": {},
    "starcoder2": {},
    "gpt_neox": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": GPT,  # its layers hold Conv1D and no linear
    "gptj": {**GPT, "rotary_dim": 4},  # positions are buffers of every layer
    "cohere": {},
    "nemotron": {},
    "minimax": {**HYBRID, "num_local_experts": 4, "head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "exaone4": {**SLIDING},
    "diffllama": {},  # makes parameters by a function that overlooks the meta device
    "llama4_text": {  # asks where its embedding lies before it calls it
        "num_local_experts": 4,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
    },
    "mamba": {"state_size": 8},
}
LAYERS = {
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "mamba": "backbone.layers",
}
"""Where the decoder layers are; under ``model.layers`` in all others."""


@lru_cache(maxsize=1)
def reference(checkpoint: Path) -> nn.Module:
    """The model as transformers itself loads it."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model


class TestArchitecture(AdapterContract):
    @pytest.fixture(params=ARCHITECTURES)
    def model_type(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def checkpoint(self, model_type: str, stored: Callable[..., Path], common: Mapping[str, Any]) -> Path:
        return stored(model_type, **{**common, **ARCHITECTURES[model_type]})

    @pytest.fixture
    def adapter(self, model_type: str, checkpoint: Path) -> object:
        return TransformersAdapter(model_type, checkpoint)

    @pytest.fixture
    def samples(self) -> Sequence[Any]:
        return ("seven 7", "twelve chars")

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return reference(checkpoint)(**inputs, use_cache=False).logits

    def test_parameters_and_buffers_are_those_of_from_pretrained(self, opened: OpenModel, checkpoint: Path) -> None:
        opened.fill()
        expected = dict(reference(checkpoint).named_buffers()) | reference(checkpoint).state_dict()
        actual = dict(opened.model.named_buffers()) | opened.model.state_dict()
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (name, actual[name].dtype) == (name, tensor.dtype)
            assert torch.equal(actual[name], tensor), name

    def test_every_stored_tensor_makes_some_parameter(self, opened: OpenModel) -> None:
        named = {key for source in opened.loader.sources.values() for key in source.keys}
        assert named == opened.checkpoint.tensors.keys()

    def test_units_are_the_decoder_layers(self, model_type: str, opened: OpenModel) -> None:
        layers = LAYERS.get(model_type, "model.layers")
        assert [request.name for request in opened.visit] == [f"{layers}.0", f"{layers}.1"]
        assert all(type(request.module).__name__.endswith(("Layer", "Block")) for request in opened.visit)
