# SPDX-License-Identifier: Apache-2.0
"""Shrinks a configuration of transformers: sizes small, what depends on them kept consistent, switches untouched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

VOCABULARY = 128
FREE_TOKENS = 64
"""Ids below are those of no special token, but for the few that are as small in the real model."""
WINDOW = 4
"""Shorter than the inputs, so that a window shows."""

HIDDEN = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")

STATE_HEADS = ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
STATE_HEAD_SIZES = ("mamba_d_head", "mamba_headdim", "mamba_head_dim")

FIXED_SECTIONS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "qwen3_omni_moe_text",
    "glm4v_text",
    "glm4v_moe_text",
)
"""Language models that mix the rotations of time, height and width even where config.json does not say how."""

TOWER_HIDDEN = ("embed_dim", "hidden_size", "d_model")
TOWER_LAYERS = ("depth", "num_hidden_layers", "encoder_layers")
TOWER_HEADS = ("num_heads", "num_attention_heads", "encoder_attention_heads")
TOWER_AT_MOST: Mapping[str, int] = {"intermediate_size": 24, "encoder_ffn_dim": 24, "projection_dim": 16}

AT_MOST: Mapping[str, int] = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group",), 2),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("kv_lora_rank",), 16),
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("zero_expert_num", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("adapter_rank",), 12),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk",), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
}
"""Sizes that nothing else must agree with. Inner sizes differ, so that a confusion of two shows."""

_TOKEN = re.compile(r"_token_(id|index|ids|idx)$")


def shrink(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A tiny configuration.

    Args:
        values: the configuration, with its parts, as ``to_dict`` gives it.
        layers: number of language layers to keep, from the first on.
    """
    return _replace_tokens(_shrink_parts(values, layers), _token_ids(values))


def _shrink_parts(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The language model, and the towers fitted to it."""
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        return shrink_text(values, layers)
    small_text = shrink_text(text, layers)
    width = _first(small_text, HIDDEN)
    small = {**values, "text_config": small_text}
    for key in ("vision_config", "audio_config"):
        if isinstance(values.get(key), Mapping):
            small[key] = shrink_tower(values[key], width)
    for key, value in (("vocab_size", VOCABULARY), ("hidden_size", width), ("mm_tokens_per_image", 4)):
        _put(small, (key,), value)
    return small


def shrink_text(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A tiny language model."""
    small = dict(values)
    heads, width = _first(values, HEADS), _first(values, HIDDEN)
    if isinstance(heads, int) and isinstance(width, int):
        head_dim = _shrink_heads(small, heads, width)
        _shrink_rotation(small, values, head_dim)
    elif isinstance(width, int):  # a state space model
        _put(small, HIDDEN, min(width, 32))
    for key, most in AT_MOST.items():
        small[key] = _at_most(small.get(key), most)
    for key in WINDOWS:
        small[key] = _at_most(small.get(key), WINDOW)
    width = _first(small, HIDDEN)
    if small.get("word_embed_proj_dim") is not None:
        small["word_embed_proj_dim"] = width
    if small.get("expand") is not None and small.get("state_size") is not None:
        small["intermediate_size"] = int(small["expand"] * width)
        small["time_step_rank"] = ceil(width / 16)
    if small.get("qk_head_dim") is not None:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    _shrink_state_heads(small, width)
    _widen_attention(small, values)
    count = _first(values, LAYERS)
    _put(small, LAYERS, layers)
    small.update({key: small[key][:layers] for key in listed_by_layer(values, count)})
    if isinstance(values.get("per_layer_config"), Mapping):
        small["per_layer_config"] = _shrink_deviations(values["per_layer_config"], layers)
    return {key: value for key, value in small.items() if key in values}


def _shrink_state_heads(small: dict[str, Any], width: int) -> None:
    """Heads of a state space beside an attention: together they are as wide as what it expands to."""
    expand = _first(small, ("mamba_expand", "expand"))
    alone = small.get("num_attention_heads") is None  # then its heads are called as those of an attention
    counts, sizes = (("num_heads",), ("head_dim",)) if alone else (STATE_HEADS, STATE_HEAD_SIZES)
    heads = _first(small, counts)
    if expand is None or heads is None or _first(small, sizes) is None:
        return
    inner = int(expand * width)
    _put(small, counts, min(heads, 4))
    _put(small, sizes, inner // min(heads, 4))
    _put(small, ("mamba_d_ssm",), inner)


def _widen_attention(small: dict[str, Any], values: Mapping[str, Any]) -> None:
    """An attention that reads the hidden state and the embedding side by side."""
    if small.get("attention_hidden_size") is not None:
        small["attention_hidden_size"] = values["attention_hidden_size"] // values["hidden_size"] * small["hidden_size"]
        small["attention_head_dim"] = small["attention_hidden_size"] // small["num_attention_heads"]


def _shrink_deviations(deviations: Mapping[str, Mapping[str, Any]], layers: int) -> dict[str, Any]:
    """Settings of single layers by their numbers; heads that are larger there stay larger."""
    most = {**AT_MOST, "head_dim": 32}
    return {
        number: {key: _at_most(value, most[key]) if key in most else value for key, value in settings.items()}
        for number, settings in deviations.items()
        if int(number) < layers
    }


def shrink_tower(values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A tiny vision or audio tower.

    Args:
        values: its configuration.
        width: hidden size of the language model that takes its features.
    """
    small = dict(values)
    heads, inner = _first(values, TOWER_HEADS), _first(values, TOWER_HIDDEN)
    few = min(heads, 2)
    _put(small, TOWER_HEADS, few)
    _put(small, TOWER_HIDDEN, few * min(inner // heads, 16))
    _put(small, ("out_hidden_size", "output_dim"), width)
    if values.get("embed_dim") is not None:  # then hidden_size is that of the language model
        _put(small, ("hidden_size",), width)
    for key, most in TOWER_AT_MOST.items():
        small[key] = _at_most(small.get(key), most)
    depth = 2
    deepstack, full = values.get("deepstack_visual_indexes"), values.get("fullatt_block_indexes")
    if deepstack:
        small["deepstack_visual_indexes"] = list(range(len(deepstack)))
        depth = len(deepstack) + 1
    if full:
        small["fullatt_block_indexes"] = [1]
    _put(small, TOWER_LAYERS, depth)
    patch = values.get("patch_size")
    if patch is not None and values.get("image_size") is not None:
        small["image_size"] = [4 * side for side in patch] if isinstance(patch, list) else 4 * patch
    if patch is not None and values.get("window_size") is not None:
        small["window_size"] = 2 * patch * values.get("spatial_merge_size", 1)
    return {key: value for key, value in small.items() if key in values}


def listed_by_layer(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What a configuration says of each layer, by key: lists, and patterns with a letter for each layer."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, list if "pattern" not in str(key) else (list, str)) and len(value) == count
    }


def _shrink_heads(small: dict[str, Any], heads: int, width: int) -> int:
    """Set heads and width, grouped queries staying grouped; gives the size of a head."""
    few = min(heads, 4)
    key_heads = _first(small, KEY_HEADS)
    if isinstance(key_heads, int):
        _put(small, KEY_HEADS, few if key_heads == heads else min(key_heads, 2))
    head_dim = small.get("head_dim") or width // heads
    rope = _rope(small)
    sections = any("mrope_section" in part for part in rope)
    if any("long_factor" in part for part in rope) or (not sections and small.get("model_type") in FIXED_SECTIONS):
        pass  # factors are listed per frequency, and sections are for the size that the published models have
    elif sections:
        head_dim = min(head_dim, int(16 / _partial(small, rope)))
    else:
        head_dim = min(head_dim, 16)
    if small.get("qk_rope_head_dim") is not None:
        small["head_dim"] = 8
    elif small.get("head_dim") is not None:
        small["head_dim"] = head_dim
    _put(small, HEADS, few)
    _put(small, HIDDEN, few * head_dim)
    return int(head_dim)


def _shrink_rotation(small: dict[str, Any], values: Mapping[str, Any], head_dim: int) -> None:
    """Scale what counts rotary channels."""
    heads, width = _first(values, HEADS), _first(values, HIDDEN)
    scale = head_dim / (values.get("head_dim") or width // heads)
    if isinstance(small.get("rotary_dim"), int):
        small["rotary_dim"] = max(2, int(small["rotary_dim"] * scale) // 2 * 2)
    for key in ("rope_parameters", "rope_scaling"):
        part = small.get(key)
        if isinstance(part, Mapping) and isinstance(part.get("mrope_section"), list):
            half = int(head_dim * _partial(small, [part])) // 2
            old = part["mrope_section"]
            sections = [max(1, section * half // sum(old)) for section in old[1:]]
            small[key] = {**part, "mrope_section": [half - sum(sections), *sections]}


def _rope(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = [values.get(key) for key in ("rope_parameters", "rope_scaling")]
    return [part for part in parts if isinstance(part, Mapping)]


def _partial(values: Mapping[str, Any], rope: list[Mapping[str, Any]]) -> float:
    """Which part of a head is rotated."""
    stated = [part.get("partial_rotary_factor") for part in (*rope, values)]
    return float(next((factor for factor in stated if factor), 1.0))


def _token_ids(values: Mapping[str, Any]) -> dict[int, int]:
    """Ids of special tokens in the small vocabulary, from its end on."""
    large = sorted({token for token in special_tokens(values) if token >= FREE_TOKENS})
    return {token: VOCABULARY - 1 - index for index, token in enumerate(large)}


def special_tokens(values: Mapping[str, Any]) -> Iterator[int]:
    """Every id that a configuration gives a meaning."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from special_tokens(value)
        elif _TOKEN.search(str(key)):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _replace_tokens(values: Mapping[str, Any], tokens: Mapping[int, int]) -> dict[str, Any]:
    replaced: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            replaced[key] = _replace_tokens(value, tokens)
        elif _TOKEN.search(str(key)):
            replaced[key] = [tokens.get(item, item) for item in value] if isinstance(value, list) else value
            if isinstance(value, int):
                replaced[key] = tokens.get(value, value)
        else:
            replaced[key] = value
    return replaced


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _put(values: dict[str, Any], keys: tuple[str, ...], value: int) -> None:
    for key in keys:
        if values.get(key) is not None:
            values[key] = value


def _at_most(value: Any, most: int) -> Any:
    if isinstance(value, list):
        return [_at_most(item, most) for item in value]
    return min(value, most) if isinstance(value, int) and not isinstance(value, bool) else value
