# SPDX-License-Identifier: Apache-2.0
"""The families of the table, as settings of tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIZES: Mapping[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
COMMON: Mapping[str, Any] = {
    **SIZES,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Every linear has a multiple of 32 inputs, so that a cell tells of the family and not of its tiny sizes."""
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
EXPERTS = {"moe_intermediate_size": 96, "num_experts_per_tok": 2, "num_experts": 4}
SHARED = {"shared_expert_intermediate_size": 96}
GROUPS = {
    "moe_intermediate_size": 96,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
WIDE = {"head_dim": 24}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
MARKS = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
}
DEEPSTACK = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
OMNI: Mapping[str, Any] = {
    "text_config": {**SIZES, "head_dim": 16, "rope_parameters": ROTARY},
    "vision_config": {"hidden_size": 32, "intermediate_size": 96, "out_hidden_size": 64},
    "audio_config": {"encoder_ffn_dim": 96, "d_model": 32, "output_dim": 64, "downsample_hidden_size": 32},
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        settings: of config.json, beside those that all language models share; of the thinker for omni models.
        left_float: patterns of linears that every scheme excludes.
        experts: pattern of the routed experts' linears; empty for a dense model.
        samples: what calibrates it: ``texts.jsonl``, ``images`` or ``sounds``.
        plugin: the adapter whose tests write such a checkpoint.
        reference: the class of transformers that loads it.
    """

    settings: Mapping[str, Any]
    left_float: Sequence[str] = ()
    experts: str = ""
    samples: str = "texts.jsonl"
    plugin: str = "transformers"
    reference: str = "AutoModelForCausalLM"


def seeing(settings: Mapping[str, Any], experts: str = "") -> Family:
    """A family that takes images."""
    return Family(settings, (), experts, "images", reference="AutoModelForMultimodalLM")


def latent(settings: Mapping[str, Any], plugin: str, *left_float: str) -> Family:
    """A family with multi-head latent attention, routed experts and a layer of multi-token prediction."""
    return Family(settings, ["*.kv_b_proj", MTP, *left_float], ROUTED, plugin=plugin)


ROUTED = "*.experts.*"
MTP = "*.eh_proj"

FAMILIES: Mapping[str, Family] = {
    "llama": Family({}),
    "mistral": Family({"sliding_window": 4, **WIDE}),
    "qwen2": Family({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    "qwen3": Family(WIDE),
    "gemma2": Family({**SLIDING, **WIDE}),
    "gemma3_text": Family({**SLIDING, **WIDE}),
    "phi3": Family({}),
    "olmo2": Family({}),
    "glm4": Family(WIDE),
    "granite": Family({}),
    "cohere2": Family({**SLIDING, **WIDE}),
    "ernie4_5": Family(WIDE),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "exaone4": Family(SLIDING),
    "hunyuan_v1_dense": Family(WIDE),
    "starcoder2": Family({}),
    "olmo3": Family(SLIDING),
    "seed_oss": Family(WIDE),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": Family({"n_layer": 2, "n_head": 4}),
    "gpt_neox": Family({}),
    "gpt2": Family({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    "falcon": Family({"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96}),
    "mamba": Family({"state_size": 8}, ["*.dt_proj"]),
    "qwen3_5_text": Family({**HYBRID, **WIDE}, ["*.in_proj_a", "*.in_proj_b"]),
    "qwen2_moe": Family({**EXPERTS, **SHARED, "decoder_sparse_step": 2}, ["*.shared_expert_gate"], ROUTED),
    "qwen3_moe": Family({**EXPERTS, **WIDE, "mlp_only_layers": [0]}, experts=ROUTED),
    "mixtral": Family({"num_local_experts": 4}, experts=ROUTED),
    "olmoe": Family({**EXPERTS}, experts=ROUTED),
    "phimoe": Family({"num_local_experts": 4}, experts=ROUTED),
    "granitemoe": Family({"num_local_experts": 4}, experts=ROUTED),
    "gpt_oss": Family({**SLIDING, **WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}, experts=ROUTED),
    "qwen3_next": Family({**EXPERTS, **HYBRID, **SHARED, **WIDE}, ["*.shared_expert_gate"], ROUTED),
    "qwen3_5_moe_text": Family(
        {**EXPERTS, **HYBRID, **SHARED, **WIDE}, ["*.in_proj_a", "*.in_proj_b", "*.shared_expert_gate"], ROUTED
    ),
    "minimax": Family({"layer_types": HYBRID["layer_types"], "num_local_experts": 4, **WIDE}, experts=ROUTED),
    "minimax_m2": Family({"num_local_experts": 4, "num_experts_per_tok": 2, **WIDE}, experts=ROUTED),
    "lfm2_moe": Family({**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, experts=ROUTED),
    "granitemoehybrid": Family(
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 96,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        experts=ROUTED,
    ),
    "llama4_text": Family(
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            **WIDE,
        }
    ),
    "jetmoe": Family({"num_local_experts": 4, "kv_channels": 16}),
    "deepseek_v2": latent({**GROUPS, **LATENT, "topk_method": "group_limited_greedy"}, "deepseek"),
    "deepseek_v3": latent({**GROUPS, **LATENT}, "deepseek"),
    "deepseek_v32": latent(
        {**GROUPS, **LATENT, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
        "deepseek",
        "*.indexer.weights_proj",
    ),
    "glm4_moe": Family({**SIZES, "moe_intermediate_size": 96, **WIDE}, [MTP], ROUTED, plugin="glm"),
    "glm4_moe_lite": latent({**SIZES, "moe_intermediate_size": 96, **LATENT}, "glm"),
    "ernie4_5_moe": Family({"moe_intermediate_size": 96, "moe_num_experts": 4, "moe_k": 2, **WIDE}, experts=ROUTED),
    "hunyuan_v1_moe": Family({"num_experts": 4, "moe_topk": 2, **WIDE}, experts=ROUTED),
    "qwen2_vl": seeing(
        {
            "text_config": {"rope_parameters": ROTARY},
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 3,
            },
            **MARKS,
        }
    ),
    "qwen2_5_vl": seeing(
        {
            "text_config": {"rope_parameters": ROTARY},
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **MARKS,
        }
    ),
    "qwen3_vl": seeing(
        {
            "text_config": {"head_dim": 16, "rope_parameters": ROTARY},
            "vision_config": DEEPSTACK,
            **MARKS,
        }
    ),
    "qwen3_vl_moe": seeing(
        {
            "text_config": {
                "head_dim": 16,
                "rope_parameters": ROTARY,
                "mlp_only_layers": [0],
                **EXPERTS,
            },
            "vision_config": DEEPSTACK,
            **MARKS,
        },
        experts=ROUTED,
    ),
    "internvl": seeing({"text_config": {"model_type": "qwen2"}, "vision_config": VISION, "image_token_id": 40}),
    "llava": seeing(
        {
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 40,
        }
    ),
    "gemma3": seeing(
        {
            "text_config": {**SLIDING, **WIDE},
            "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 40,
            "boi_token_index": 42,
            "eoi_token_index": 43,
        }
    ),
    "glm4v_moe": Family(
        {
            "text_config": {**SIZES, "moe_intermediate_size": 96, "head_dim": 16, "rope_parameters": ROTARY},
            "vision_config": {"hidden_size": 32, "intermediate_size": 96, "out_hidden_size": 64},
        },
        (),
        ROUTED,
        "images",
        "glm",
        "AutoModelForMultimodalLM",
    ),
    "qwen2_5_omni": Family(
        OMNI, samples="sounds", plugin="qwen-omni", reference="Qwen2_5OmniThinkerForConditionalGeneration"
    ),
    "qwen3_omni_moe": Family(
        {**OMNI, "text_config": {**OMNI["text_config"], **EXPERTS}},
        experts=ROUTED,
        samples="sounds",
        plugin="qwen-omni",
        reference="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
}
