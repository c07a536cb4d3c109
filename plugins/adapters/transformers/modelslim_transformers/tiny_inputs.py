# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a tiny model, as its processor would give them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelslim.api import CapabilityError
from modelslim_transformers.tiny_config import FREE_TOKENS, special_tokens

LENGTHS = (9, 14)
"""Words of the inputs, more than the windows of a tiny model hold."""
GRID = (1, 8, 8)
"""Frames and patches of a picture, more than the windows of a tiny tower hold."""


def make_inputs(model: Any) -> list[dict[str, Any]]:
    """Arguments of the model's forward, one mapping per sample; the first with a picture if the model looks at some.

    Raises:
        CapabilityError: how many tokens a picture becomes is not known for this architecture.
    """
    config = getattr(model.config, "thinker_config", model.config)
    taken = set(special_tokens(config.to_dict()))
    words = torch.tensor([token for token in range(FREE_TOKENS) if token not in taken])
    first, second = (words[torch.randint(len(words), (1, length))] for length in LENGTHS)
    if getattr(config, "vision_config", None) is None:
        return [{"input_ids": first}, {"input_ids": second}]
    return [_with_picture(model, config, first), {"input_ids": second, "attention_mask": torch.ones_like(second)}]


def _with_picture(model: Any, config: Any, words: Tensor) -> dict[str, Any]:
    """A text with a picture between its second and third word."""
    count, picture = _picture(config)
    token = _first(config, "image_token_id", "image_token_index")
    begin, end = _first(config, "vision_start_token_id"), _first(config, "vision_end_token_id")
    middle = [*([begin] if begin is not None else []), *[token] * count, *([end] if end is not None else [])]
    ids = torch.cat([words[:, :2], torch.tensor([middle]), words[:, 2:]], 1)
    kinds = (ids == token).long()
    optional = {"mm_token_type_ids": kinds, "token_type_ids": kinds}
    known = inspect.signature(type(model).forward).parameters
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{key: value.to(model.dtype) if value.is_floating_point() else value for key, value in picture.items()},
        **{key: value for key, value in optional.items() if key in known},
    }


def _picture(config: Any) -> tuple[int, Mapping[str, Tensor]]:
    """How many tokens a picture becomes, and its pixels."""
    vision = config.vision_config
    if hasattr(vision, "temporal_patch_size") and hasattr(vision, "spatial_merge_size"):
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        frames, rows, columns = GRID
        pixels = torch.randn(frames * rows * columns, size)
        count = frames * rows * columns // vision.spatial_merge_size**2
        return count, {"pixel_values": pixels, "image_grid_thw": torch.tensor([GRID])}
    size, patch = (_side(getattr(vision, key, None)) for key in ("image_size", "patch_size"))
    patches = (size // patch) ** 2
    pixels = {"pixel_values": torch.randn(1, 3, size, size)}
    if hasattr(config, "mm_tokens_per_image"):
        return config.mm_tokens_per_image, pixels
    if hasattr(config, "downsample_ratio"):
        return int(patches * config.downsample_ratio**2), pixels
    if config.model_type == "llava":
        return patches + (config.vision_feature_select_strategy == "full"), pixels
    raise CapabilityError(f"how many tokens a picture becomes is not known for {config.model_type!r}")


def _first(config: Any, *keys: str) -> Any:
    return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)


def _side(size: Any) -> int:
    if size is None:
        raise CapabilityError("its vision tower states no image_size and no patch_size")
    return int(size[0] if isinstance(size, (list, tuple)) else size)
