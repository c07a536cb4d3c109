# SPDX-License-Identifier: Apache-2.0
"""Multimodal families beyond those whose processors are tested: inputs made by hand, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelslim.checkpoint import Checkpoint
from modelslim.testing.adapter import OpenModel
from modelslim_transformers.adapter import TransformersAdapter

pytestmark = pytest.mark.usefixtures("no_grad")

IMAGE, VIDEO, BEGIN, END = 40, 41, 42, 43
Settings = Mapping[str, Any]

MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
HYBRID = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
"""An image of 16 x 32 is seen as a whole and as two tiles: 16 + 36 tokens."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).bfloat16()


def ids(*parts: int | tuple[int, int]) -> dict[str, Tensor]:
    """Tokens; a pair is a token and how often it comes."""
    tokens = [part if isinstance(part, tuple) else (part, 1) for part in parts]
    return {"input_ids": torch.tensor([[token for token, count in tokens for _ in range(count)]])}


def square(tokens: int, **others: Tensor) -> dict[str, Tensor]:
    return {**ids(5, (IMAGE, tokens), 6, 7), "pixel_values": random(1, 3, 16, 16), **others}


def patches() -> dict[str, Tensor]:
    sample = ids(5, BEGIN, (IMAGE, 4), END, 6, 7)
    grid = {"pixel_values": random(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {**sample, "mm_token_type_ids": (sample["input_ids"] == IMAGE).long(), **grid}


def tiles() -> dict[str, Tensor]:
    return {"pixel_values": random(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}


FAMILIES: Mapping[str, tuple[Settings, Settings, list[str], Callable[[], dict[str, Tensor]]]] = {
    "qwen2_vl": (
        {"rope_parameters": ROTARY},
        {
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **MARKS,
        },
        ["model.visual"],
        patches,
    ),
    "qwen3_5": (HYBRID, {"vision_config": {**QWEN, "num_position_embeddings": 16}, **MARKS}, ["model.visual"], patches),
    "paligemma": (
        {"model_type": "gemma", "head_dim": 8},
        {"vision_config": {**SIGLIP, "projection_dim": 32}, "projection_dim": 32, "image_token_id": IMAGE},
        ["model.vision_tower"],
        lambda: square(16),
    ),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 8},
        {
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        ["model.vision_tower"],
        lambda: square(4, image_sizes=torch.tensor([[16, 16]])),
    ),
    "llava_next": (  # a parameter of the model itself is used behind the tower
        {"model_type": "llama"},
        {"vision_config": CLIP, "image_token_index": IMAGE, **TILES},
        ["model.vision_tower"],
        lambda: {**ids(5, (IMAGE, 16 + 36), 7), **tiles()},
    ),
    "llava_onevision": (  # calls tower, connector, tower, connector
        {"model_type": "qwen2"},
        {"vision_config": SIGLIP, **INDICES, **TILES, "vision_feature_layer": -1}
        | {"vision_feature_select_strategy": "full"},
        ["model.vision_tower"],
        lambda: {
            **ids(5, (IMAGE, 16 + 36), 6, (VIDEO, 4 + 1), 7),
            **tiles(),
            "pixel_values_videos": random(1, 1, 3, 16, 16),
        },
    ),
    "video_llava": (  # defines the tower for videos first and calls that for images first
        {"model_type": "llama"},
        {"vision_config": CLIP, **INDICES, "image_seq_length": 16, "video_seq_length": 17 * 8},
        ["model.image_tower", "model.video_tower"],
        lambda: {
            **ids(5, (IMAGE, 16), 6, (VIDEO, 17 * 8), 7),
            "pixel_values_images": random(1, 3, 16, 16),
            "pixel_values_videos": random(1, 8, 3, 16, 16),
        },
    ),
    "idefics3": (  # moves its inputs to the device that its first parameter has
        {"model_type": "llama"},
        {"vision_config": VISION, "image_token_id": IMAGE, "scale_factor": 2},
        ["model.vision_model"],
        lambda: {**ids(5, (IMAGE, 4), 6), "pixel_values": random(1, 1, 3, 16, 16)},
    ),
    "llama4": (
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}
        | {"no_rope_layers": [1, 0]},
        {
            "vision_config": {**VISION, "intermediate_size": 64, "pixel_shuffle_ratio": 0.5}
            | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
            "image_token_index": IMAGE,
        },
        ["vision_model"],
        lambda: square(4),
    ),
    "mllama": (  # a text passes by the layers that look at the image
        {"cross_attention_layers": [0]},
        {
            "vision_config": {**VISION, "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 2}
            | {
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": IMAGE,
        },
        ["model.vision_model"],
        lambda: {
            **ids(5, IMAGE, 6, 7),
            "pixel_values": random(1, 1, 2, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
            "cross_attention_mask": torch.ones(1, 4, 1, 2, dtype=torch.long),
        },
    ),
    "qwen2_audio": (  # makes a mask on the device of its tower
        {"model_type": "qwen2"},
        {
            "audio_config": {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2}
            | {"encoder_ffn_dim": 24, "max_source_positions": 8},
            "audio_token_index": IMAGE,
        },
        ["model.audio_tower"],
        lambda: {
            **ids(5, (IMAGE, 4), 6, 7),
            "input_features": random(1, 8, 16),
            "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    ),
}
"""Settings of the language part, settings beside it, towers, and an input."""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_unit_by_unit_gives_what_transformers_gives(
    model_type: str, stored: Callable[..., Path], common: Mapping[str, Any]
) -> None:
    from transformers import AutoModelForMultimodalLM

    text, others, towers, make = FAMILIES[model_type]
    path = stored(model_type, text_config={**common, **text}, **others)
    inputs = [ids(5, 6, 7, 8), make(), ids(9, 8), make()]
    whole: Any = AutoModelForMultimodalLM.from_pretrained(path)
    with Checkpoint(path) as checkpoint:
        model = OpenModel.of(TransformersAdapter(model_type, path), checkpoint)
        units = [request.name for request in model.visit]
        assert (units[: len(towers)], len(units)) == (towers, len(towers) + common["num_hidden_layers"])
        assert checkpoint.tensors.keys() == {key for source in model.loader.sources.values() for key in source.keys}
        outputs = model.run_units(inputs)
    for output, sample in zip(outputs, inputs, strict=True):
        assert torch.equal(output, whole(**sample, use_cache=False).logits)
