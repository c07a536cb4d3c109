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

from modelslim.api import VlmCalibSample
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
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MARKS = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
DEEPSTACK = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

MULTIMODAL: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": ROTARY},
        "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **MARKS,
    },
    "qwen3_vl": {"text_config": {"head_dim": 8, "rope_parameters": ROTARY}, "vision_config": DEEPSTACK, **MARKS},
    "qwen3_vl_moe": {
        "text_config": {
            "head_dim": 8,
            "rope_parameters": ROTARY,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
        "vision_config": DEEPSTACK,
        **MARKS,
    },
    "internvl": {"text_config": {"model_type": "qwen2"}, "vision_config": VISION, "image_token_id": 40},
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 40,
    },
    "gemma3": {
        "text_config": {**SLIDING, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 40,
        "boi_token_index": 42,
        "eoi_token_index": 43,
    },
}
"""Settings beside those that are common to all language parts."""
TOWERS = {"internvl": "model.vision_tower", "llava": "model.vision_tower", "gemma3": "model.vision_tower"}
"""The module that looks at pictures; ``model.visual`` in all others."""
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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    sees = hasattr(AutoConfig.from_pretrained(checkpoint), "vision_config")
    model: nn.Module = (AutoModelForMultimodalLM if sees else AutoModelForCausalLM).from_pretrained(checkpoint)
    return model


class TestArchitecture(AdapterContract):
    @pytest.fixture(params=[*ARCHITECTURES, *MULTIMODAL])
    def model_type(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def checkpoint(self, model_type: str, stored: Callable[..., Path], common: Mapping[str, Any]) -> Path:
        if model_type in MULTIMODAL:
            settings = MULTIMODAL[model_type]
            return stored(model_type, **{**settings, "text_config": {**common, **settings["text_config"]}})
        return stored(model_type, **{**common, **ARCHITECTURES[model_type]})

    @pytest.fixture
    def adapter(self, model_type: str, checkpoint: Path) -> object:
        return TransformersAdapter(model_type, checkpoint)

    @pytest.fixture
    def samples(self, model_type: str, pictures: Sequence[Path]) -> Sequence[Any]:
        texts = ("seven 7", "twelve chars")
        return [*texts, *map(VlmCalibSample, texts, map(str, pictures))] if model_type in MULTIMODAL else texts

    def whole_forward(self, model: nn.Module, inputs: Any, checkpoint: Path) -> Any:
        return reference(checkpoint)(**inputs, use_cache=False).logits

    def test_parameters_and_buffers_are_those_of_from_pretrained(
        self, opened: OpenModel, checkpoint: Path, fused_state: Callable[[Any], dict[str, torch.Tensor]]
    ) -> None:
        opened.fill()
        expected = fused_state(reference(checkpoint))
        actual = dict(opened.model.named_buffers()) | opened.model.state_dict()
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (name, actual[name].dtype) == (name, tensor.dtype)
            assert torch.equal(actual[name], tensor), name

    def test_every_stored_tensor_makes_some_parameter(self, opened: OpenModel) -> None:
        named = {key for source in opened.loader.sources.values() for key in source.keys}
        assert named == opened.checkpoint.tensors.keys()

    def test_units_are_the_vision_tower_and_the_decoder_layers(self, model_type: str, opened: OpenModel) -> None:
        layers = LAYERS.get(model_type, "model.layers")
        towers = []
        if model_type in MULTIMODAL:
            layers, towers = "model.language_model.layers", [TOWERS.get(model_type, "model.visual")]
        assert [request.name for request in opened.visit] == [*towers, f"{layers}.0", f"{layers}.1"]
        classes = [type(request.module).__name__ for request in opened.visit[len(towers) :]]
        assert all(name.endswith(("Layer", "Block")) for name in classes)
